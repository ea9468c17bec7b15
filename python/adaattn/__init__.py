"""AdaAttn: attention with an error budget, on NumPy arrays and torch tensors. Start with `help(adaattn.attention)`."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from adaattn.functional import attention, describe, merge, reference, reference_backward
from adaattn.measurement import Statistics, measure
from adaattn.metrics import Metrics
from adaattn.plan import Plan
from adaattn.policy import Policy, PolicyMismatchError, PolicyStatistics

if TYPE_CHECKING:
    from adaattn._fallbacks import HookStatistics
    from adaattn.hf import register_transformers
    from adaattn.hooks import disable, enable, enabled, hook_statistics, is_enabled
    from adaattn.module import AdaptiveAttention

try:
    __version__ = version("adaattn")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+source"

# What needs torch is imported at its first use: torch takes seconds, and may not be there.
_NEED_TORCH = {
    "AdaptiveAttention": "adaattn.module",
    "HookStatistics": "adaattn._fallbacks",
    "disable": "adaattn.hooks",
    "enable": "adaattn.hooks",
    "enabled": "adaattn.hooks",
    "hook_statistics": "adaattn.hooks",
    "is_enabled": "adaattn.hooks",
    "register_transformers": "adaattn.hf",
}

__all__ = [
    "AdaptiveAttention",
    "HookStatistics",
    "Metrics",
    "Plan",
    "Policy",
    "PolicyMismatchError",
    "PolicyStatistics",
    "Statistics",
    "__version__",
    "attention",
    "describe",
    "disable",
    "enable",
    "enabled",
    "hook_statistics",
    "is_enabled",
    "measure",
    "merge",
    "reference",
    "reference_backward",
    "register_transformers",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_NEED_TORCH[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"adaattn.{name} needs PyTorch: pip install 'adaattn[torch]'") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NEED_TORCH])
