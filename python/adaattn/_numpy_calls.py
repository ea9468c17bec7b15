"""attention, merge, reference and describe on NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaattn import _calls
from adaattn._arrays import Array, check_array, contiguous_view, key_lengths_array, mask_view, packed, view
from adaattn._library import HEAD_REPORT_WORDS, STAGES
from adaattn._options import CallOptions
from adaattn._shapes import check_heads, check_output_size
from adaattn.plan import Plan

_ALIGNMENT = 64


class _Problem:
    """The checked inputs of one call as views, and the arrays that keep them alive."""

    def __init__(self, q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool) -> None:
        self.q, self.k, self.v = view("q", q), view("k", k), view("v", v)
        check_heads(q.shape, k.shape, v.shape, enable_gqa)
        self.mask = None if attn_mask is None else mask_view(attn_mask)
        self.lengths = None if key_lengths is None else key_lengths_array(key_lengths, q.shape[0])
        self.lengths_address = 0 if self.lengths is None else int(self.lengths.ctypes.data)
        self.out_shape = (*q.shape[:3], v.shape[3])
        check_output_size(q.shape, v.shape)


class _Workspace:
    """Memory for one call."""

    def __call__(self, size: int) -> int:
        self.memory = np.empty(size + _ALIGNMENT - 1, np.uint8)
        return -(-int(self.memory.ctypes.data) // _ALIGNMENT) * _ALIGNMENT


def attention(
    q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool, options: CallOptions, plan: Plan | None,
    *_: Any,
) -> tuple[Array, ...]:  # fmt: skip
    """(out, lse)."""
    return _run(q, k, v, attn_mask, key_lengths, enable_gqa, options, plan, False, False)


def attention_reported(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any,
    key_lengths: Any,
    enable_gqa: bool,
    options: CallOptions,
    plan: Plan | None,
    statistics: bool,
    *_: Any,
) -> tuple[Array, ...]:
    """(out, lse, heads, times), and (entropy, max_probability) if statistics are wanted; heads: raw reports."""
    return _run(q, k, v, attn_mask, key_lengths, enable_gqa, options, plan, True, statistics)


def _run(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any,
    key_lengths: Any,
    enable_gqa: bool,
    options: CallOptions,
    plan: Plan | None,
    report: bool,
    statistics: bool,
) -> tuple[Array, ...]:
    problem = _Problem(q, k, v, attn_mask, key_lengths, enable_gqa)
    plans = None if plan is None else plan.records(*q.shape[:2])
    out = np.empty(problem.out_shape, q.dtype)
    rows = [np.empty(q.shape[:3], np.float32) for _ in range(5 if statistics else 1)]  # the masses are in the reports
    lse, entropy, max_probability, *masses = (*(int(row.ctypes.data) for row in rows), 0, 0, 0, 0)[:5]
    reports = (np.zeros((*q.shape[:2], HEAD_REPORT_WORDS), np.int64), np.zeros(STAGES)) if report else ()
    heads, times = (*(int(array.ctypes.data) for array in reports), 0, 0)[:2]
    _calls.forward(
        problem.q,
        problem.k,
        problem.v,
        problem.mask,
        contiguous_view(out),
        lse,
        entropy,
        max_probability,
        problem.lengths_address,
        options,
        _calls.Execution(_Workspace()),
        heads,
        0 if plans is None else int(plans.ctypes.data),
        times,
        0,
        *masses,
    )
    return (out, rows[0], *reports, *rows[1:3])


def effective(options: CallOptions, *_: Any) -> CallOptions:
    """The options that attention() runs with."""
    return options


def waits_for_reports(q: Any) -> bool:
    """Whether asking for reports by head holds up the caller."""
    return False


def backward(
    q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, out: Any, lse: Any, dout: Any, options: CallOptions
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) in the dtype of q, from an out and its float32 lse; heads may be grouped."""
    problem = _Problem(q, k, v, attn_mask, key_lengths, enable_gqa=True)
    rows = _float32_rows("lse", lse, q)
    dq, dk, dv = (np.empty(array.shape, array.dtype) for array in (q, k, v))
    _calls.backward(
        problem.q,
        problem.k,
        problem.v,
        problem.mask,
        view("out", out),
        view("dout", dout),
        rows.ctypes.data,
        contiguous_view(dq),
        contiguous_view(dk),
        contiguous_view(dv),
        problem.lengths_address,
        options,
        _calls.Execution(_Workspace()),
    )
    return dq, dk, dv


def describe(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any,
    key_lengths: Any,
    enable_gqa: bool,
    options: CallOptions,
    plan: Plan | None,
    statistics: bool,
) -> str:
    """What the table says about the problem, as JSON text."""
    problem = _Problem(q, k, v, attn_mask, key_lengths, enable_gqa)
    plans = None if plan is None else plan.records(*q.shape[:2])
    out = packed(problem.q[1], problem.q[2], problem.out_shape)
    views = problem.q, problem.k, problem.v, problem.mask, out
    address = 0 if plans is None else int(plans.ctypes.data)
    return _calls.describe(views, statistics, options, problem.lengths is not None, address)


def reference(
    q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool, options: CallOptions
) -> tuple[Array, Array]:
    """(out, lse) in float64."""
    problem = _Problem(q, k, v, attn_mask, key_lengths, enable_gqa)
    out, lse = np.empty(problem.out_shape, np.float64), np.empty(q.shape[:3], np.float64)
    _calls.reference_forward(
        problem.q,
        problem.k,
        problem.v,
        problem.mask,
        problem.lengths_address,
        options,
        out.ctypes.data,
        lse.ctypes.data,
    )
    return out, lse


def reference_backward(
    q: Any, k: Any, v: Any, dout: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool, options: CallOptions
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) in float64."""
    problem = _Problem(q, k, v, attn_mask, key_lengths, enable_gqa)
    gradients = tuple(np.empty(array.shape, np.float64) for array in (q, k, v))
    _calls.reference_backward(
        problem.q,
        problem.k,
        problem.v,
        problem.mask,
        view("dout", dout),
        problem.lengths_address,
        options,
        *(gradient.ctypes.data for gradient in gradients),
    )
    return gradients  # type: ignore[return-value]


def merge(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Array, Array]:
    """(out, lse) of all parts."""
    views = [view(f"outs[{index}]", part) for index, part in enumerate(outs)]
    part_lses = [_float32_rows(f"lses[{index}]", lse, outs[index]) for index, lse in enumerate(lses)]
    out, merged_lse = np.empty(outs[0].shape, outs[0].dtype), np.empty(outs[0].shape[:3], np.float32)
    addresses = [int(lse.ctypes.data) for lse in part_lses]
    _calls.merge(views, addresses, contiguous_view(out), int(merged_lse.ctypes.data), num_threads=0)
    return out, merged_lse


def _float32_rows(name: str, value: Any, part: Array) -> Array:
    """An LSE as the library takes it."""
    rows = check_array(name, value)
    if rows.dtype != np.float32:
        raise TypeError(f"{name} has dtype {rows.dtype}, must be float32")
    if rows.shape != part.shape[:3]:
        raise ValueError(f"{name} has shape {rows.shape}, must be (B, H, N) = {part.shape[:3]}")
    return np.require(rows, requirements=["C", "A"])
