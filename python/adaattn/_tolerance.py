"""How far a right kernel may be from the FP64 truth: the bounds of `adaattn verify` and of the tests, and why.

Errors are relative Frobenius errors of one (batch, head) matrix. u is the unit roundoff, half the distance from 1 to
the next number: rounding a value changes it by at most u of itself, so rounding a matrix by at most u of its norm.

A sum of n terms in FP32 is off by about sqrt(n) u of the sum's size, since rounding errors have random signs (Higham
and Mary 2019, "A new approach to probabilistic rounding error analysis"); the strict bound n u would hide real faults.
SAFETY covers what that statement leaves to chance and the differing order of sums. It is far from the errors of any
cheaper arithmetic: FP32 results come out near 3e-7 and pass below 6e-6; TF32 or FP16 arithmetic is wrong by 3e-4.
"""

from __future__ import annotations

import math

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SAFETY = 4.0
# exp, the final division and their arguments: a few roundings each.
_SCALAR_STEPS = 8.0


def _fp32(dim: int, keys: int, score_size: float) -> float:
    # An absolute error of a score is a relative error of its exponential. A score is a sum of dim terms of its own
    # size, the row sum and the outputs are sums of one term per key.
    steps = math.sqrt(max(dim, 1)) * max(score_size, 1.0) + math.sqrt(max(keys, 1)) + _SCALAR_STEPS
    return SAFETY * steps * UNIT_ROUNDOFF["float32"]


def _low_precision(dtype: str, roundings: int) -> float:
    return 0.0 if dtype == "float32" else roundings * UNIT_ROUNDOFF[dtype]


def forward_tolerance(dtype: str, dim: int, keys: int, score_size: float = 1.0) -> float:
    """For out. score_size is the size of the scaled scores, about 1 for normally distributed q and k."""
    # 16-bit kernels may round the probabilities to the inputs' dtype for matrix units, and the output is rounded to it.
    return _fp32(dim, keys, score_size) + _low_precision(dtype, 2)


def lse_tolerance(dim: int, keys: int, largest: float, score_size: float = 1.0) -> float:
    """Absolute, for LSE of size up to largest: it is computed and stored in FP32 whatever the inputs' dtype."""
    return _fp32(dim, keys, score_size) + 2 * UNIT_ROUNDOFF["float32"] * largest


def backward_tolerance(dtype: str, dim: int, rows: int, score_size: float = 1.0) -> float:
    """For dq, dk and dv, relative to the size of their terms; rows is the larger of Nq * Hq / Hk and Nk."""
    # Twice the forward pass: probabilities again, then products with sums over dim and rows of their own. In 16 bits, P
    # and dS may be rounded for matrix units, delta comes from the rounded out, and the result is rounded.
    return 2 * _fp32(dim, rows, score_size) + _low_precision(dtype, 4)
