"""The options of a call: checked where the user's words are still known, flattened as the C struct wants them."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, Literal, NamedTuple

Window = tuple[int | None, int | None]
Alignment = Literal["top_left", "bottom_right"]
Guarantee = Literal["measured", "bounded"]
Backward = Literal["exact", "consistent"]

BUDGETED = ("_adaptive", "_bounded")
"""How the names of kernels that use a budget end."""

_INT64_MAX = 2**63 - 1


class CallOptions(NamedTuple):
    """Checked options; the order is that of the torch operators' schema."""

    error: float = 0.0
    scale: float | None = None
    causal: bool = False
    bottom_right: bool = False
    window_left: int = -1
    window_right: int = -1
    sinks: int = 0
    bounded: bool = False
    kernel: str | None = None

    @property
    def guarantee(self) -> Guarantee:
        return "bounded" if self.bounded else "measured"


def flat(
    options: tuple[Any, ...], kernel: int = 0, num_threads: int = 0, deterministic: bool = False
) -> tuple[Any, ...]:
    """The fields of adaattn_options in order; kernel is the address of the name, or 0."""
    error, scale, causal, bottom_right, left, right, sinks, bounded, _ = options
    has_scale = scale is not None
    return (
        error,
        scale if has_scale else 0.0,
        has_scale,
        causal,
        bottom_right,
        left,
        right,
        sinks,
        num_threads,
        deterministic,
        bounded,
        kernel,
    )


def _number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, must be a number")
    return float(value)


def _count(name: str, value: Any) -> int:
    try:
        result = operator.index(value)
    except TypeError:
        result = -1
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, must be an integer >= 0")
    if not 0 <= result <= _INT64_MAX:
        raise ValueError(f"{name} is {value!r}, must be in 0..2**63 - 1")
    return result


def flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's
        return bool(value)
    raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, must be True or False")


def _window(window: Any) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window is {window!r} of type {type(window).__name__}, must be None or (left, right)")
    if len(window) != 2:
        raise ValueError(f"window is {window!r}, must have two entries, (left, right)")
    left, right = window
    return (
        -1 if left is None or left == -1 else _count("window[0] (left)", left),
        -1 if right is None or right == -1 else _count("window[1] (right)", right),
    )


def checked_error(error: Any) -> float:
    """The budget as a float. Raises TypeError or ValueError naming it."""
    number = _number("error", error)
    if not 0 <= number < math.inf:
        raise ValueError(f"error is {number}, must be a finite number >= 0 (0 is exact)")
    return number


def checked_guarantee(guarantee: Any) -> Guarantee:
    """Raises ValueError naming it."""
    if guarantee not in ("measured", "bounded"):
        raise ValueError(f'guarantee is {guarantee!r}, must be "measured" or "bounded"')
    known: Guarantee = guarantee
    return known


def checked_backward(backward: Any) -> Backward:
    """Raises ValueError naming it."""
    if backward not in ("exact", "consistent"):
        raise ValueError(f'backward is {backward!r}, must be "exact" or "consistent"')
    known: Backward = backward
    return known


def make_options(
    error: Any,
    is_causal: Any,
    scale: Any,
    alignment: Any,
    window: Any,
    sinks: Any,
    kernel: Any,
    guarantee: Any = "measured",
) -> CallOptions:
    """Raises TypeError or ValueError, naming the argument of `adaattn.attention`."""
    error = checked_error(error)
    if scale is not None:
        scale = _number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}, must be finite, or None for 1 / sqrt(D)")
    if alignment not in ("top_left", "bottom_right"):
        raise ValueError(f'alignment is {alignment!r}, must be "top_left" or "bottom_right"')
    if kernel is not None and not isinstance(kernel, str):
        raise TypeError(f"kernel is {kernel!r} of type {type(kernel).__name__}, must be a name or None")
    if kernel is not None and "\0" in kernel:
        raise ValueError(f"kernel is {kernel!r}, must not hold a null character")
    left, right = _window(window)
    return CallOptions(
        error=error,
        scale=scale,
        causal=flag("is_causal", is_causal),
        bottom_right=alignment == "bottom_right",
        window_left=left,
        window_right=right,
        sinks=_count("sinks", sinks),
        bounded=checked_guarantee(guarantee) == "bounded",
        kernel=kernel,
    )
