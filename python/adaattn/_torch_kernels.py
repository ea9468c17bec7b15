"""What the torch operators run on CPU and CUDA tensors, and the shapes and layouts of their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from adaattn import _calls, _torch_arrays
from adaattn._library import HEAD_REPORT_WORDS, STAGES, TILE_KEYS, panel_rows
from adaattn._options import CallOptions
from adaattn._torch_arrays import empty_in_order_of, empty_rows, view
from adaattn.plan import FORMS, PLAN_WORDS

_UNWRITTEN = 255  # no class of tiles
_LOW_RANK = FORMS.index("low_rank")


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    options: Any,
    make_results: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    plans: Tensor | None = None,
    tile_classes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    views = view("q", q, q), view("k", k, q), view("v", v, q)
    mask_view = None if mask is None else view("attn_mask", mask, q, is_mask=True)
    results = make_results(q, v)
    lse, heads, times, entropy, max_probability = (*(part.data_ptr() for part in results[1:]), 0, 0, 0, 0)[:5]
    # Their means are in the reports of heads.
    masses = [empty_rows(q) for _ in range(2 if entropy and q.is_cpu else 0)]
    summarised_mass, omitted_mass = (*(rows.data_ptr() for rows in masses), 0, 0)[:2]
    with _torch_arrays.device_of(q):
        _calls.forward(
            *views,
            mask_view,
            view("out", results[0], q),
            lse,
            entropy,
            max_probability,
            _torch_arrays.key_lengths_address(key_lengths, q),
            options,
            _torch_arrays.execution_on(q),
            heads,
            0 if plans is None else _checked_plans(plans, q).data_ptr(),
            times,
            0 if tile_classes is None else tile_classes.data_ptr(),
            summarised_mass=summarised_mass,
            omitted_mass=omitted_mass,
        )
    return results


def forward_results(q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """(out, lse)."""
    return empty_in_order_of(q, v.shape[3]), empty_rows(q)


def forward_reported_results(q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """(out, lse, heads, times), the last two in host memory in any case: a call on a GPU that uses a budget waits."""
    heads = torch.zeros((*q.shape[:2], HEAD_REPORT_WORDS), dtype=torch.int64)
    return *forward_results(q, v), heads, torch.zeros(STAGES, dtype=torch.float64)


def forward_statistics_results(q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """(out, lse, heads, times, entropy, max_probability)."""
    return *forward_reported_results(q, v), empty_rows(q), empty_rows(q)


def recorded_results(q: Tensor, k: Tensor, v: Tensor, statistics: bool) -> tuple[Tensor, ...]:
    """(out, lse, heads, times, entropy, max_probability, tile_classes); without statistics the two are empty."""
    shape = (*q.shape[:2], (q.shape[2] + panel_rows() - 1) // panel_rows(), (k.shape[2] + TILE_KEYS - 1) // TILE_KEYS)
    rows = [empty_rows(q) if statistics else torch.empty(0, device=q.device) for _ in range(2)]
    return *forward_reported_results(q, v), *rows, torch.full(shape, _UNWRITTEN, dtype=torch.uint8, device=q.device)


def _checked_plans(plans: Tensor, q: Tensor) -> Tensor:
    want = (*q.shape[:2], PLAN_WORDS)
    if plans.dtype != torch.int32 or tuple(plans.shape) != want or not plans.is_cpu or not plans.is_contiguous():
        raise ValueError(
            f"plans is {tuple(plans.shape)} {plans.dtype} on {plans.device}, must be contiguous {want} torch.int32 on "
            "cpu: the C structs of adaattn.Plan"
        )
    return plans


def forward(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    return _run_forward(q, k, v, attn_mask, key_lengths, options, forward_results)


def forward_planned(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None, *options_and_plans: Any
) -> tuple[Tensor, ...]:
    *options, plans = options_and_plans
    return _run_forward(q, k, v, attn_mask, key_lengths, options, forward_results, plans)


def forward_reported(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None, *options_and_plans: Any
) -> tuple[Tensor, ...]:
    *options, plans = options_and_plans
    return _run_forward(q, k, v, attn_mask, key_lengths, options, forward_reported_results, plans)


def forward_statistics(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None, *options_and_plans: Any
) -> tuple[Tensor, ...]:
    *options, plans = options_and_plans
    return _run_forward(q, k, v, attn_mask, key_lengths, options, forward_statistics_results, plans)


def forward_recorded(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None, *options_and_plans: Any
) -> tuple[Tensor, ...]:
    """What the backward pass of an adaptive forward pass needs, too: what became of each tile."""
    *options, plans, statistics = options_and_plans
    results = recorded_results(q, k, v, statistics)

    def made(q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return results[: 6 if statistics else 4]

    _run_forward(q, k, v, attn_mask, key_lengths, options, made, plans, results[-1])
    forms = _plan_words(results[2])[:, 0].reshape(q.shape[:2])
    if (forms == _LOW_RANK).any():  # which has no gradient of its own: exactly, then
        _run_forward(q, k, v, attn_mask, key_lengths, CallOptions(*options)._replace(error=0.0, kernel=None), made)
        return results
    classes, tiled = results[-1].flatten(2), forms != 0
    if classes.shape[2] and (tiled & (classes[..., 0] == _UNWRITTEN).cpu()).any():
        raise NotImplementedError(
            'the kernel that took this call does not say what became of its tiles: use backward="exact", or call it '
            "under torch.no_grad()"
        )
    return results


def _plan_words(heads: Tensor) -> Tensor:
    """Plans [B * Hq, PLAN_WORDS] out of the reports of a call; the form is the first word."""
    return heads.reshape(-1, HEAD_REPORT_WORDS).view(torch.int32)[:, :PLAN_WORDS].contiguous()


def backward_recorded(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: Tensor,
    tile_classes: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    """The gradient of what forward_recorded computed."""
    plans = _plan_words(heads)
    if not plans[:, :2].any():  # every head is dense in float32: the exact gradient, and any mask
        return backward(dout, q, k, v, attn_mask, key_lengths, out, lse, *options)
    return _run_backward(
        dout, q, k, v, attn_mask, key_lengths, out, lse, options, plans.data_ptr(), tile_classes.data_ptr()
    )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    return _run_backward(dout, q, k, v, attn_mask, key_lengths, out, lse, options, 0, 0)


def _run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Any,
    plans: int,
    tile_classes: int,
) -> tuple[Tensor, ...]:
    inputs = view("q", q, q), view("k", k, q), view("v", v, q)
    mask = None if attn_mask is None else view("attn_mask", attn_mask, q, is_mask=True)
    dout_view = view("dout", dout, q)
    lse = _torch_arrays.checked_lse("lse", lse, q)
    gradients = gradients_like(q, k, v)
    with _torch_arrays.device_of(q):
        _calls.backward(
            *inputs,
            mask,
            view("out", out, q),
            dout_view,
            lse.data_ptr(),
            view("dq", gradients[0], q),
            view("dk", gradients[1], q),
            view("dv", gradients[2], q),
            _torch_arrays.key_lengths_address(key_lengths, q),
            _backward_options(CallOptions(*options), q),
            _torch_arrays.execution_on(q),
            plans,
            tile_classes,
        )
    return gradients


def gradients_like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(empty_in_order_of(tensor, tensor.shape[3]) for tensor in (q, k, v))


@lru_cache(maxsize=2)
def backward_kernels(device: str) -> frozenset[str]:
    """Names of the backward kernels that this machine can run on tensors of the device, "cpu" or "cuda"."""
    kernels = json.loads(_calls.describe(None, False, CallOptions()))["kernels"]
    return frozenset(
        kernel["name"]
        for kernel in kernels
        if kernel["operation"] == "backward" and kernel["device"] == device and not kernel["unavailable"]
    )


def _backward_options(options: CallOptions, q: Tensor) -> CallOptions:
    """A kernel named for the forward pass holds for the backward pass only if there is one of that name."""
    if options.kernel is None or options.kernel in backward_kernels("cuda" if q.is_cuda else "cpu"):
        return options
    return options._replace(kernel=None)


def merge_cpu(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    first = outs[0]
    views = [view(f"outs[{index}]", part, first) for index, part in enumerate(outs)]
    rows = [_torch_arrays.checked_lse(f"lses[{index}]", lse, outs[index]) for index, lse in enumerate(lses)]
    out, lse = merge_results(outs, lses)
    _calls.merge(
        views, [row.data_ptr() for row in rows], view("out", out, first), lse.data_ptr(), torch.get_num_threads()
    )
    return out, lse


def merge_cuda(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same in torch's own operators: memory-bound work that needs no kernel of ours."""
    for index, (part, lse) in enumerate(zip(outs, lses, strict=True)):
        view(f"outs[{index}]", part, outs[0])
        _torch_arrays.checked_lse(f"lses[{index}]", lse, part)
        if part.shape != outs[0].shape or part.dtype != outs[0].dtype:
            raise ValueError(
                f"outs[{index}] is {tuple(part.shape)} {part.dtype}, must be like outs[0], "
                f"{tuple(outs[0].shape)} {outs[0].dtype}"
            )
    stacked = torch.stack(lses)
    total = torch.logsumexp(stacked, 0)
    hidden = stacked == -torch.inf  # such parts do not count, whatever they hold
    weights = torch.where(hidden, 0.0, torch.exp(stacked - total))
    out, lse = merge_results(outs, lses)
    accumulated = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for part, weight, skip in zip(outs, weights, hidden, strict=True):
        accumulated += torch.where(skip[..., None], 0.0, weight[..., None] * part.float())
    return out.copy_(accumulated), lse.copy_(total)


def merge_results(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    first = outs[0]
    return empty_in_order_of(first, first.shape[3]), empty_rows(first)
