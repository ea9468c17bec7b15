"""What the torch integrations check of their arguments and of tensors before a call, and the budget they keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from adaattn._options import Guarantee, checked_error, checked_guarantee
from adaattn.policy import Policy, checked_policy

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Budget(NamedTuple):
    """What calls ask for: see adaattn.attention and adaattn.Policy."""

    error: float = 0.0
    guarantee: Guarantee = "measured"
    policy: Policy | None = None


def checked_budget(error: Any, guarantee: Any, policy: Any) -> Budget:
    """Raises TypeError or ValueError naming what is wrong, as adaattn.attention does."""
    return Budget(checked_error(error), checked_guarantee(guarantee), checked_policy(policy))
