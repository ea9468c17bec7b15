"""attention, merge, reference and describe on torch tensors; the counterpart of _numpy_calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaattn import _calls, torch_op
from adaattn._arrays import View, packed
from adaattn._options import Backward, CallOptions
from adaattn._shapes import check_heads, check_output_size
from adaattn._torch_arrays import key_lengths_address, view
from adaattn.plan import Plan


def attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any,
    key_lengths: Any,
    enable_gqa: bool,
    options: CallOptions,
    plan: Plan | None = None,
    backward: Backward = "exact",
) -> tuple[Tensor, ...]:
    """(out, lse)."""
    if options.error > 0 and backward == "consistent" and _records(q, k, v):
        return attention_reported(q, k, v, attn_mask, key_lengths, enable_gqa, options, plan, False, backward)[:2]
    attn_mask, key_lengths = _checked(q, k, v, attn_mask, key_lengths, enable_gqa)
    inputs = q, k, v, attn_mask, key_lengths
    results: tuple[Tensor, ...]
    if plan is None:
        results = torch_op.call(torch_op.forward_op, *inputs, *options)
    else:
        results = torch_op.call(torch_op.forward_planned_op, *inputs, *options, _words(plan, q))
    return results


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
    backward: Backward,
) -> tuple[Tensor, ...]:
    """(out, lse, heads, times), and (entropy, max_probability) if statistics are wanted; heads: raw reports."""
    attn_mask, key_lengths = _checked(q, k, v, attn_mask, key_lengths, enable_gqa)
    plans = None if plan is None else _words(plan, q)
    op = torch_op.forward_statistics_op if statistics else torch_op.forward_reported_op
    rest: tuple[Any, ...] = (*options, plans)
    if options.error > 0 and backward == "consistent" and _records(q, k, v):
        op, rest = torch_op.forward_recorded_op, (*rest, statistics)
    results: tuple[Tensor, ...] = torch_op.call(op, q, k, v, attn_mask, key_lengths, *rest)
    return results[: 6 if statistics else 4]


def backward(
    q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, out: Any, lse: Any, dout: Any, options: CallOptions
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) in the dtype of q, from an out and its float32 lse; heads may be grouped."""
    attn_mask, key_lengths = _checked(q, k, v, attn_mask, key_lengths, enable_gqa=True)
    gradients: tuple[Tensor, ...] = torch_op.backward_op(dout, q, k, v, attn_mask, key_lengths, out, lse, *options)
    return gradients


def _words(plan: Plan, q: Tensor) -> Tensor:
    """The C structs of a plan."""
    return torch.tensor(plan.words(q.shape[0], q.shape[1]), dtype=torch.int32)


def effective(options: CallOptions, backward: Backward, *inputs: Any) -> CallOptions:
    """The options that attention() runs with. Calls that record an exact gradient run exactly: with the out and lse of
    an approximate forward pass the error of an exact backward pass would be twice that. On GPUs none other is known."""
    if options.error > 0 and (backward == "exact" or _on_gpu(inputs[0])) and _records(*inputs):
        return options._replace(error=0.0)
    return options


def waits_for_reports(q: Any) -> bool:
    """Whether asking for reports by head holds up the caller: those of GPUs are there once the call has run."""
    return _on_gpu(q)


def _on_gpu(q: Any) -> bool:
    return isinstance(q, Tensor) and q.is_cuda


def _records(*inputs: Any) -> bool:
    """Whether a gradient may be recorded; inside of torch.func's transforms tensors do not tell."""
    wanted = any(getattr(x, "requires_grad", False) for x in inputs) or torch_op.transforms_active()
    return torch.is_grad_enabled() and wanted


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
    attn_mask, key_lengths = _checked(q, k, v, attn_mask, key_lengths, enable_gqa)
    plans = None if plan is None else _words(plan, q)
    views = view("q", q, q), view("k", k, q), view("v", v, q)
    mask = None if attn_mask is None else view("attn_mask", attn_mask, q, is_mask=True)
    out = packed(views[0][1], views[0][2], (*q.shape[:3], v.shape[3]))
    address = 0 if plans is None else plans.data_ptr()
    return _calls.describe((*views, mask, out), statistics, options, key_lengths is not None, address)


def reference(
    q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool, options: CallOptions
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64."""
    inputs, lengths = _reference_inputs(q, k, v, attn_mask, key_lengths, enable_gqa)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=torch.float64)
    lse = torch.empty(q.shape[:3], dtype=torch.float64)
    _calls.reference_forward(*inputs, key_lengths_address(lengths, q), options, out.data_ptr(), lse.data_ptr())
    return out, lse


def reference_backward(
    q: Any, k: Any, v: Any, dout: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool, options: CallOptions
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) in float64."""
    inputs, lengths = _reference_inputs(q, k, v, attn_mask, key_lengths, enable_gqa)
    gradients = tuple(torch.empty(tensor.shape, dtype=torch.float64) for tensor in (q, k, v))
    _calls.reference_backward(
        *inputs,
        view("dout", _tensor("dout", dout), q),
        key_lengths_address(lengths, q),
        options,
        *(gradient.data_ptr() or 64 for gradient in gradients),
    )
    return gradients


def merge(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of all parts."""
    for name, tensors in (("outs", outs), ("lses", lses)):
        for index, tensor in enumerate(tensors):
            _tensor(f"{name}[{index}]", tensor)
    if outs[0].dim() != 4:
        raise ValueError(f"outs[0] has {outs[0].dim()} dimensions, must have 4: (B, H, N, D)")
    merged: tuple[Tensor, Tensor] = torch_op.merge_op(list(outs), list(lses))
    return merged


def _reference_inputs(
    q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool
) -> tuple[tuple[View, View, View, View | None], Tensor | None]:
    if isinstance(q, Tensor) and not q.is_cpu:
        raise NotImplementedError(f"the reference takes cpu tensors only, q is on {q.device}")
    attn_mask, key_lengths = _checked(q, k, v, attn_mask, key_lengths, enable_gqa)
    mask = None if attn_mask is None else view("attn_mask", attn_mask, q, is_mask=True)
    return (view("q", q, q), view("k", k, q), view("v", v, q), mask), key_lengths


def _shape(name: str, value: Any) -> torch.Size:
    shape = _tensor(name, value).shape
    if len(shape) != 4:
        raise ValueError(f"{name} has {len(shape)} dimensions, shape {tuple(shape)}, must have 4: (B, H, N, D)")
    return shape


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}, must be a torch tensor like q")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} is a {'nested' if value.is_nested else value.layout} tensor, must be strided")
    return value


def _checked(
    q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Checks what the operators cannot, and returns mask and key lengths as they want them."""
    shapes = _shape("q", q), _shape("k", k), _shape("v", v)
    for name, value in (("k", k), ("v", v), ("attn_mask", attn_mask)):
        if isinstance(value, Tensor) and value.device != q.device:
            raise ValueError(f"{name} is on {value.device}, must be where q is, on {q.device}")
    check_heads(*shapes, enable_gqa)
    check_output_size(shapes[0], shapes[2])
    if attn_mask is not None:
        dims = _tensor("attn_mask", attn_mask).dim()
        if not 1 <= dims <= 4:
            raise ValueError(
                f"attn_mask has {dims} dimensions, shape {tuple(attn_mask.shape)}, must have 1 to 4, "
                "broadcastable to (B, Hq, Nq, Nk)"
            )
        if dims < 4:
            attn_mask = attn_mask[(None,) * (4 - dims)]
    return attn_mask, None if key_lengths is None else _key_lengths(key_lengths, q.device)


def _key_lengths(value: Any, device: torch.device) -> Tensor:
    lengths = torch.as_tensor(value, device=None if isinstance(value, Tensor) else device)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"key_lengths has dtype {lengths.dtype}, must be integers")
    return lengths.to(torch.int64).contiguous()
