"""What the torch integrations check of their arguments and of tensors before a call."""

from __future__ import annotations

import torch

from adaattn import _options

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def checked_error(error: float) -> float:
    """The budget as a float. Raises TypeError or ValueError naming it, as adaattn.attention does."""
    return _options.make_options(error, False, None, "top_left", None, 0, None).error
