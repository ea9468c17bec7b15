"""The torch operators adaattn::forward, forward_planned, forward_reported, forward_statistics, forward_recorded,
backward, backward_recorded and merge, their autograd and autocast.

Importing this module registers them once. `adaattn.attention` and `adaattn.merge` are the way to call them, except for
torch.ops.adaattn.backward(dout, q, k, v, attn_mask, key_lengths, out, lse, *options) -> (dq, dk, dv), which takes any
out and lse, also merged ones: ring attention calls it per set of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adaattn._options import CallOptions
from adaattn._torch_kernels import (
    backward,
    backward_kernels,
    backward_recorded,
    forward,
    forward_planned,
    forward_recorded,
    forward_reported,
    forward_reported_results,
    forward_results,
    forward_statistics,
    forward_statistics_results,
    gradients_like,
    merge_cpu,
    merge_cuda,
    merge_results,
    recorded_results,
)

# What torch.library itself uses for this; private, so its absence only costs speed.
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
transforms_active: Any = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether torch.func's transforms wrap the tensors of this call."""

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? key_lengths"
_OPTIONS = (
    "float error, float? scale, bool causal, bool bottom_right, int window_left, int window_right, int sinks, "
    "bool bounded, str? kernel"
)
_OPTION_COUNT = len(CallOptions._fields)
_REPORTS = "Tensor heads, Tensor times"
_RECORDED_RESULTS = 7  # of forward_recorded; no other operator has as many

_library: Any = torch.library  # untyped
_unpack_dual: Any = forward_ad.unpack_dual
_lib = _library.Library("adaattn", "DEF")
for _schema in (
    f"forward({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    f"forward_planned({_INPUTS}, {_OPTIONS}, Tensor plans) -> (Tensor out, Tensor lse)",
    f"forward_reported({_INPUTS}, {_OPTIONS}, Tensor? plans) -> (Tensor out, Tensor lse, {_REPORTS})",
    f"forward_statistics({_INPUTS}, {_OPTIONS}, Tensor? plans) -> (Tensor out, Tensor lse, {_REPORTS}, "
    "Tensor entropy, Tensor max_probability)",
    f"forward_recorded({_INPUTS}, {_OPTIONS}, Tensor? plans, bool statistics) -> (Tensor out, Tensor lse, {_REPORTS}, "
    "Tensor entropy, Tensor max_probability, Tensor tile_classes)",
    f"backward(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    f"backward_recorded(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, Tensor heads, Tensor tile_classes, {_OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    "merge(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

forward_op = torch.ops.adaattn.forward.default
forward_planned_op = torch.ops.adaattn.forward_planned.default
forward_reported_op = torch.ops.adaattn.forward_reported.default
forward_statistics_op = torch.ops.adaattn.forward_statistics.default
forward_recorded_op = torch.ops.adaattn.forward_recorded.default
backward_op = torch.ops.adaattn.backward.default
backward_recorded_op = torch.ops.adaattn.backward_recorded.default
merge_op = torch.ops.adaattn.merge.default


for _name, _kernel in (
    ("forward", forward),
    ("forward_planned", forward_planned),
    ("forward_reported", forward_reported),
    ("forward_statistics", forward_statistics),
    ("forward_recorded", forward_recorded),
    ("backward", backward),
    ("backward_recorded", backward_recorded),
):
    _lib.impl(_name, _kernel, "CPU")
    _lib.impl(_name, _kernel, "CUDA")
_lib.impl("merge", merge_cpu, "CPU")
_lib.impl("merge", merge_cuda, "CUDA")


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return forward_results(q, v)


def _forward_reported_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return forward_reported_results(q, v)


def _forward_statistics_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return forward_statistics_results(q, v)


def _forward_recorded_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return recorded_results(q, k, v, rest[-1])


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return gradients_like(q, k, v)


for _name, _fake in (
    ("adaattn::forward", _forward_fake),
    ("adaattn::forward_planned", _forward_fake),
    ("adaattn::forward_reported", _forward_reported_fake),
    ("adaattn::forward_statistics", _forward_statistics_fake),
    ("adaattn::forward_recorded", _forward_recorded_fake),
    ("adaattn::backward", _backward_fake),
    ("adaattn::backward_recorded", _backward_fake),
    ("adaattn::merge", merge_results),
):
    _library.register_fake(_name, _fake, lib=_lib)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if inputs[3] is not None and inputs[3].requires_grad:
        raise NotImplementedError(
            "attn_mask requires grad, but gets no gradient: detach it, or use PyTorch's attention"
        )
    q, k, v, attn_mask, key_lengths, *rest = inputs
    if any(ctx.needs_input_grad[:3]):
        refuse_without_backward("cuda" if q.is_cuda else "cpu")
    # A recorded pass is differentiated as it was run: plans and classes of tiles are constants.
    ctx.recorded = len(output) == _RECORDED_RESULTS
    recorded = (output[2], output[-1]) if ctx.recorded else ()
    ctx.save_for_backward(q, k, v, attn_mask, key_lengths, *output[:2], *recorded)
    ctx.options = rest[:_OPTION_COUNT]
    ctx.undifferentiated = 2 + len(rest)  # inputs after q, k and v
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def refuse_without_backward(device: str) -> None:
    """Raises NotImplementedError now rather than in the backward pass, while the caller can still go another way."""
    if not backward_kernels(device):
        raise NotImplementedError(
            f"q, k or v requires grad, but no backward kernel runs on {device} tensors here (see `adaattn info`): call "
            "it under torch.no_grad(), or use PyTorch's attention"
        )


def _differentiate(
    ctx: Any, dout: Tensor | None, *_: Any, run: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    none = (None,) * ctx.undifferentiated
    if dout is None:
        return None, None, None, *none
    op = backward_recorded_op if ctx.recorded else backward_op
    inputs = dout, *ctx.saved_tensors, *ctx.options
    gradients = op(*inputs) if run is None else run(op, *inputs)
    wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:3], strict=True))
    return *wanted, *none


def _refuse_double_backward(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "adaattn has no second derivatives: the gradient of adaattn.attention is not differentiable"
    )


def _refuse_merge_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    raise NotImplementedError(
        "adaattn.merge got a part that requires grad, but is not differentiable: call it under torch.no_grad() and "
        "torch.ops.adaattn.backward with the merged out and lse for each set of keys"
    )


for _name in ("forward", "forward_planned", "forward_reported", "forward_statistics", "forward_recorded"):
    _library.register_autograd(f"adaattn::{_name}", _differentiate, setup_context=_save, lib=_lib)
for _name in ("backward", "backward_recorded"):
    _library.register_autograd(f"adaattn::{_name}", _refuse_double_backward, lib=_lib)
_library.register_autograd("adaattn::merge", _refuse_double_backward, setup_context=_refuse_merge_gradient, lib=_lib)


class _Attention(torch.autograd.Function):
    """The same formula for eager calls: register_autograd looks its schema up anew in every call, which takes longer
    than all the rest."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_op: Any) -> Any:
        *inputs, op = inputs_and_op
        output = _call_below_autograd(op, *inputs)
        _save(ctx, tuple(inputs), output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        recorded = torch.is_grad_enabled()  # create_graph=True
        run = _Gradients.apply if recorded else _call_below_autograd
        return *_differentiate(ctx, *gradients, run=run), None


class _TransformedAttention(torch.autograd.Function):
    """The form that torch.func.grad and torch.vmap need; torch takes 10 us more for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs_and_op: Any) -> Any:
        *inputs, op = inputs_and_op
        return _call_below_autograd(op, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs[:-1], output)

    backward = _Attention.backward


class _Gradients(torch.autograd.Function):
    """The backward operator in an eager graph, where it refuses second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *inputs: Any) -> Any:
        return _call_below_autograd(op, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        _refuse_double_backward(ctx)


def call(op: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *rest: Any) -> Any:
    """op(q, k, v, attn_mask, *rest) on the shortest way through torch that gives the same."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
        return op(q, k, v, attn_mask, *rest)
    if forward_ad._current_level >= 0 and any(_unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise NotImplementedError("adaattn has no forward-mode derivatives: q, k or v is a dual tensor")
    if transforms_active() and torch.is_grad_enabled():  # their wrappers do not tell what requires grad
        return _TransformedAttention.apply(q, k, v, attn_mask, *rest, op)
    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    if torch.is_grad_enabled() and (needs_grad or (attn_mask is not None and attn_mask.requires_grad)):
        refuse_without_backward("cuda" if q.is_cuda else "cpu")
        return _Attention.apply(q, k, v, attn_mask, *rest, op)
    return _call_below_autograd(op, q, k, v, attn_mask, *rest)


def _call_below_autograd(op: Any, *args: Any) -> Any:
    """Skips the autograd kernel, a round trip through Python, where nothing is recorded."""
    with _below_autograd():
        return op(*args)


def _register_autocast(op: Any, device: str) -> None:
    def cast_and_call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(*(_lowered(tensor, dtype) for tensor in (q, k, v)), *rest)

    _lib.impl(op.name().split("::")[1], cast_and_call, f"Autocast{device.upper()}")


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As SDPA does it; an additive mask stays float32, where -3e38 does not become -inf."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


for _op in (forward_op, forward_planned_op, forward_reported_op, forward_statistics_op, forward_recorded_op):
    for _device in ("cpu", "cuda"):
        _register_autocast(_op, _device)
