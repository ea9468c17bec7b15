"""Checks on shapes that only Python makes; everything else about shapes the C library checks."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_ELEMENTS = 2**50


def check_heads(q: Sequence[int], k: Sequence[int], v: Sequence[int], enable_gqa: bool) -> None:
    """As in torch, fewer key than query heads have to be asked for. Raises ValueError."""
    if not enable_gqa and (q[1] != k[1] or q[1] != v[1]):
        raise ValueError(
            f"q has {q[1]} heads, k {k[1]} and v {v[1]}, must be the same, "
            "or set enable_gqa=True if those of k divide those of q"
        )


def check_output_size(q: Sequence[int], v: Sequence[int]) -> None:
    """Raises ValueError if no memory could hold the output, before NumPy or torch fail in their own words."""
    if q[0] * q[1] * q[2] * v[3] > _MOST_ELEMENTS:
        shape = (q[0], q[1], q[2], v[3])
        raise ValueError(f"the output (B, Hq, Nq, Dv) = {shape} of q and v is too large: over 2**50 elements")
