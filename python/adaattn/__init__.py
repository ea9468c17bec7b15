"""AdaAttn: attention with an error budget, on NumPy arrays and torch tensors. Start with `help(adaattn.attention)`."""

from importlib.metadata import PackageNotFoundError, version

from adaattn.functional import attention, describe, merge, reference, reference_backward
from adaattn.metrics import Metrics

try:
    __version__ = version("adaattn")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+source"

__all__ = ["Metrics", "__version__", "attention", "describe", "merge", "reference", "reference_backward"]
