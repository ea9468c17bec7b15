"""Attention as functions on NumPy arrays and torch tensors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from adaattn import _numpy_calls, _options
from adaattn._calls import describe as _describe_library
from adaattn._options import Alignment, Backward, CallOptions, Guarantee, Window
from adaattn.metrics import HeadReports, Metrics, average_rank, stage_seconds
from adaattn.plan import Plan, checked_plan


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    error: float = 0.0,
    guarantee: Guarantee = "measured",
    plan: Plan | None = None,
    backward: Backward = "exact",
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_metrics: bool = False,
    alignment: Alignment = "top_left",
    window: Window | None = None,
    sinks: int = 0,
    key_lengths: Any = None,
    kernel: str | None = None,
) -> Any:
    """softmax(scale * q k^T + mask) v for every batch entry and head, without ever holding the scores.

    All of q, k, v and attn_mask are NumPy arrays, or all are torch tensors on one device. They may have any strides and
    are never copied. With torch it is an operator with autograd (for q, k and v) that works under torch.compile.

    Args:
        q: Queries (B, Hq, Nq, D) in float32, float16 or bfloat16 (NumPy: of the package ml_dtypes).
        k: Keys (B, Hk, Nk, D), dtype of q.
        v: Values (B, Hk, Nk, Dv), dtype of q.
        error: Budget for the relative Frobenius error of each (batch, query head) of the output before it is rounded
            to its dtype, >= 0. 0 asks for exact attention. Long sequences without a mask use it, on CPUs and, in
            float16 and bfloat16 from 2.5e-2 on, on Hopper GPUs: each head's error is measured on some rows, and a head
            that is over its budget runs again. Exact kernels meet every budget and run in all other cases, gradients
            included; the metrics say so.
        guarantee: What the budget promises. "measured": each head's error is estimated from rows that are computed
            exactly, too. "bounded": every tile is scored, and an upper bound on each head's error is kept below the
            budget, which leaves less to save; on GPUs such calls run exactly.
        plan: What each head starts with, for example another call's `metrics.heads.plan`; it is judged as the engine's
            own, and heads over budget run again. None: the engine plans. Not with error=0.
        backward: With torch, what error > 0 means for calls that record a gradient. "exact": they run exactly.
            "consistent": they use the budget, and the gradient is that of what was computed, with the classes of tiles
            as constants and scores rounded as they were. Of most heads of language models dk and dv are one to two
            times as wrong as the output, dq up to five times (`adaattn gradients` measures it). On GPUs they run
            exactly all the same.
        is_causal: Hide every key after the diagonal. As in torch, not together with attn_mask.
        attn_mask: 1 to 4 dimensions, broadcastable to (B, Hq, Nq, Nk). Bool: True shows the key. Float32 or the dtype
            of q: added to the scaled scores. It gets no gradient; one that requires it is refused.
        scale: Finite factor on q k^T; None is 1 / sqrt(D).
        enable_gqa: Allow Hk < Hq where Hk divides Hq; query head h reads key head h * Hk // Hq.
        return_lse: Also return the natural log of each row's sum of exponentials, (B, Hq, Nq) in float32, -inf where a
            row sees no key. It is not differentiable.
        return_metrics: Also return an `adaattn.Metrics`. On GPUs a call that uses its budget then waits until it has
            run, which a CUDA graph cannot capture.
        alignment: Where the diagonal of is_causal and window lies if Nq != Nk: "top_left" puts query 0 at key 0 (as
            torch does), "bottom_right" the last query at the last key (queries that follow a KV cache).
        window: (left, right): hide keys more than left before or right after the diagonal; None is no limit.
        sinks: So many first keys stay visible left of the window (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453).
        key_lengths: (B,) integers in 0..Nk; keys at and after them are hidden and never read. For CUDA tensors an int64
            tensor on the same device saves a copy.
        kernel: Name of the only kernel to consider (`adaattn info` lists them); None takes the first that fits.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of q, or (out[, lse][, metrics]). Rows that see no key are 0. NumPy: C order;
        torch: the order of dimensions in memory that q has, (B, N, H, D) or (B, H, N, D).

    Raises:
        TypeError, ValueError: an argument is malformed or two do not fit together; the message names it.
        NotImplementedError: well-formed, but no kernel takes it; the message has each kernel's reasons.
    """
    options = _options.make_options(error, is_causal, scale, alignment, window, sinks, kernel, guarantee)
    if not return_metrics:
        _refuse_both(is_causal, attn_mask)
        calls, backward = _calls_for(q), _options.checked_backward(backward)
        gqa = _options.flag("enable_gqa", enable_gqa)
        plan = checked_plan(plan, options.error)
        options = calls.effective(options, backward, q, k, v)
        if options.error == 0:
            plan = None
        out, lse = calls.attention(q, k, v, attn_mask, key_lengths, gqa, options, plan, backward)
        return (out, lse) if return_lse else out
    result, _, _ = attention_reported(
        q,
        k,
        v,
        error=error,
        guarantee=guarantee,
        plan=plan,
        backward=backward,
        is_causal=is_causal,
        attn_mask=attn_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        return_metrics=return_metrics,
        alignment=alignment,
        window=window,
        sinks=sinks,
        key_lengths=key_lengths,
        kernel=kernel,
    )
    return result


def attention_reported(
    q: Any,
    k: Any,
    v: Any,
    *,
    error: float = 0.0,
    guarantee: Guarantee = "measured",
    plan: Plan | None = None,
    backward: Backward = "exact",
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_metrics: bool = False,
    alignment: Alignment = "top_left",
    window: Window | None = None,
    sinks: int = 0,
    key_lengths: Any = None,
    kernel: str | None = None,
) -> tuple[Any, Any, Any]:
    """(what attention() returns, the words of HeadReports, stage times); arrays or tensors on the CPU, as q is."""
    options = _options.make_options(error, is_causal, scale, alignment, window, sinks, kernel, guarantee)
    _refuse_both(is_causal, attn_mask)
    calls = _calls_for(q)
    gqa = _options.flag("enable_gqa", enable_gqa)
    plan = checked_plan(plan, options.error)
    backward = _options.checked_backward(backward)
    asked, options = options, calls.effective(options, backward, q, k, v)
    if options.error == 0:
        plan = None
    facts: dict[str, Any] = {}
    statistics = False
    if return_metrics:
        facts, statistics = _facts(calls, q, k, v, attn_mask, key_lengths, gqa, options, plan)
    out, lse, words, times, *rows = calls.attention_reported(
        q, k, v, attn_mask, key_lengths, gqa, options, plan, statistics, backward
    )
    result = (out, lse) if return_lse else (out,)
    if return_metrics:
        heads, seconds = HeadReports.from_words(words), stage_seconds(times)
        result = (*result, _metrics(facts, q, k, rows, heads, seconds, asked, options))
    return result[0] if len(result) == 1 else result, words, times


def merge(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    """Merges attention over disjoint sets of keys into attention over their union, as ring attention needs it.

    lse = log sum_i exp(lses[i]) and out = sum_i exp(lses[i] - lse) outs[i] (Liu et al. 2023, arXiv 2310.01889). Parts
    whose lse is -inf do not count.

    Parts O_i that are wrong by at most e_i ||O_i|| (Frobenius, per head, as within a budget e_i) merge into an output
    that is wrong by at most sqrt(sum_i (e_i ||O_i||)^2) + ||tanh(delta / 2) * distance||, where by row delta is the
    largest error of a part's LSE and distance the largest between the true outputs of two parts: the weights of the
    parts sum to 1, and errors of delta in their logarithms move at most tanh(delta / 2) of that from part to part.

    Args:
        outs: One (B, H, N, D) output per set of keys, all of one dtype.
        lses: One (B, H, N) float32 LSE for each, from `attention(..., return_lse=True)`.

    Returns:
        (out, lse) over the union.

    Raises:
        TypeError, ValueError: the parts do not fit together, or there are none.
        NotImplementedError: a part requires grad; the gradient needs the merged results, see docs of
            `torch.ops.adaattn.backward`.
    """
    for name, value in (("outs", outs), ("lses", lses)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} is of type {type(value).__name__}, must be a list or tuple of parts")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs has {len(outs)} parts and lses {len(lses)}, must be the same and at least 1")
    merged: tuple[Any, Any] = _calls_for(outs[0], "outs[0]").merge(outs, lses)
    return merged


def reference(
    q: Any,
    k: Any,
    v: Any,
    *,
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    alignment: Alignment = "top_left",
    window: Window | None = None,
    sinks: int = 0,
    key_lengths: Any = None,
) -> tuple[Any, Any]:
    """The same attention in FP64, slow: the truth that errors are measured against.

    Arguments as in `attention`, on NumPy arrays or CPU tensors; there is no autograd, see `reference_backward`.

    Returns:
        (out, lse), (B, Hq, Nq, Dv) and (B, Hq, Nq), both float64.
    """
    options = _options.make_options(0.0, is_causal, scale, alignment, window, sinks, None)
    _refuse_both(is_causal, attn_mask)
    gqa = _options.flag("enable_gqa", enable_gqa)
    result: tuple[Any, Any] = _calls_for(q).reference(q, k, v, attn_mask, key_lengths, gqa, options)
    return result


def reference_backward(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    *,
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    alignment: Alignment = "top_left",
    window: Window | None = None,
    sinks: int = 0,
    key_lengths: Any = None,
) -> tuple[Any, Any, Any]:
    """Gradients of `reference` in FP64 for the gradient dout (B, Hq, Nq, Dv) of its output, in the dtype of q.

    Returns:
        (dq, dk, dv) in the shapes of q, k and v, all float64.
    """
    options = _options.make_options(0.0, is_causal, scale, alignment, window, sinks, None)
    _refuse_both(is_causal, attn_mask)
    gqa = _options.flag("enable_gqa", enable_gqa)
    result: tuple[Any, Any, Any] = _calls_for(q).reference_backward(q, k, v, dout, attn_mask, key_lengths, gqa, options)
    return result


def describe(
    q: Any = None,
    k: Any = None,
    v: Any = None,
    *,
    error: float = 0.0,
    guarantee: Guarantee = "measured",
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_metrics: bool = False,
    alignment: Alignment = "top_left",
    window: Window | None = None,
    sinks: int = 0,
    key_lengths: Any = None,
    kernel: str | None = None,
) -> dict[str, Any]:
    """What this machine can run, or with q, k and v which kernels would take that call of `attention`.

    Returns:
        version, instruction_sets, cuda_devices, cuda_unavailable (a reason, or ""), and kernels: the whole table in
        order, each with name, operation, device, summary and unavailable (reasons why this machine cannot run it).
        With q, k and v only the forward kernels, each also with declines (reasons why it does not take the call), and
        chosen, the name of the one that runs.

    Raises:
        As `attention`; NotImplementedError if no kernel takes the call.
    """
    options = _options.make_options(error, is_causal, scale, alignment, window, sinks, kernel, guarantee)
    _refuse_both(is_causal, attn_mask)
    if q is None and k is None and v is None:
        text = _describe_library(None, False, CallOptions())
    else:
        gqa = _options.flag("enable_gqa", enable_gqa)
        text = _calls_for(q).describe(q, k, v, attn_mask, key_lengths, gqa, options, None, bool(return_metrics))
    facts: dict[str, Any] = json.loads(text)
    return facts


def _calls_for(value: Any, name: str = "q") -> ModuleType:
    if isinstance(value, np.ndarray):
        return _numpy_calls
    if "torch" in sys.modules:  # else it cannot be a tensor, and torch takes a second to import
        import torch

        if isinstance(value, torch.Tensor):
            from adaattn import _torch_calls

            return _torch_calls
    raise TypeError(f"{name} is of type {type(value).__name__}, must be a NumPy array or a torch tensor")


def _refuse_both(is_causal: bool, attn_mask: Any) -> None:
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask are both set, must be one: put the causal part into attn_mask")


def _metrics(
    facts: dict[str, Any],
    q: Any,
    k: Any,
    rows: Sequence[Any],
    heads: HeadReports,
    seconds: dict[str, float] | None,
    asked: CallOptions,
    options: CallOptions,
) -> Metrics:
    b, h, nq, dim = q.shape
    nk = k.shape[2]
    entropy, max_probability = map(_row_mean, rows) if rows else (None, None)
    return Metrics(
        kernel=facts["chosen"],
        form=heads.form,
        compute_precision=_precision(facts, q, heads),
        error_budget=asked.error,
        guarantee=asked.guarantee,
        entropy=entropy,
        max_probability=max_probability,
        avg_rank=average_rank(heads, b * h, min(dim, nq, nk)),
        work=float(heads.work.mean()) if b * h else math.nan,
        memory_saved_gb=b * h * nq * nk * q.dtype.itemsize / 1e9,
        seconds=seconds,
        heads=heads,
        fallback=_fallback(facts, bool(rows), asked, options),
    )


def _precision(facts: dict[str, Any], q: Any, heads: HeadReports) -> str:
    chosen = next(kernel for kernel in facts["kernels"] if kernel["name"] == facts["chosen"])
    if chosen["name"] == _REFERENCE:
        return "float64"
    if chosen["name"].endswith(_options.BUDGETED) and heads.precisions:
        return "+".join(heads.precisions)
    if chosen["device"] == "cuda":  # matrix units multiply in the inputs' dtype
        return str(q.dtype).removeprefix("torch.")
    return "float32"


def _facts(calls: ModuleType, *call: Any) -> tuple[dict[str, Any], bool]:
    """What the table says about the call, and whether it is made with statistics: not if no kernel takes it so, and not
    if that costs it its budget. call: as calls.describe takes it, without the last."""
    *_, options, _ = call
    try:
        facts: dict[str, Any] = json.loads(calls.describe(*call, True))
    except NotImplementedError:  # perhaps only because of the statistics
        return json.loads(calls.describe(*call, False)), False
    if options.error > 0 and not facts["chosen"].endswith(_options.BUDGETED):
        without: dict[str, Any] = json.loads(calls.describe(*call, False))
        if without["chosen"].endswith(_options.BUDGETED):
            return without, False
        facts["kernels"] = without["kernels"]  # statistics are not why they decline
    return facts, True


def uses_budget(
    q: Any,
    k: Any,
    v: Any,
    *,
    error: float,
    guarantee: Guarantee = "measured",
    plan: Plan | None = None,
    backward: Backward = "exact",
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    alignment: Alignment = "top_left",
    window: Window | None = None,
    sinks: int = 0,
    key_lengths: Any = None,
    kernel: str | None = None,
    **_: Any,
) -> bool:
    """Whether a kernel that uses budgets takes this call of attention(). Raises as that does."""
    options = _options.make_options(error, is_causal, scale, alignment, window, sinks, kernel, guarantee)
    _refuse_both(is_causal, attn_mask)
    calls = _calls_for(q)
    options = calls.effective(options, _options.checked_backward(backward), q, k, v)
    gqa = _options.flag("enable_gqa", enable_gqa)
    if options.error == 0:
        return False
    facts = json.loads(calls.describe(q, k, v, attn_mask, key_lengths, gqa, options, plan, False))
    return bool(facts["chosen"].endswith(_options.BUDGETED))


def waits_for_reports(q: Any) -> bool:
    """Whether a call on such inputs that reports by head waits until it has run."""
    return bool(_calls_for(q).waits_for_reports(q))


def _row_mean(rows: Any) -> Any:
    return rows.sum(-1) / rows.shape[-1] if rows.shape[-1] else rows.sum(-1) + float("nan")


_REFERENCE = "reference_fp64"


def _fallback(facts: dict[str, Any], statistics: bool, asked: CallOptions, options: CallOptions) -> str | None:
    """Why something was not reported, a budget not used, or the slow reference ran."""
    chosen = facts["chosen"]
    reasons = []
    if not statistics:
        budgeted = f" within error={options.error:g}" if options.error > 0 else ""
        reasons.append(f"no kernel that takes this call{budgeted} reports entropy and largest probability")
    if asked.error > 0 and options.error == 0:
        reasons.append(f"error={asked.error:g} is met exactly: calls that record a gradient run exact kernels")
    elif asked.error > 0 and not chosen.endswith(_options.BUDGETED):
        why = _reasons(facts, lambda name: name.endswith(_options.BUDGETED)) or "no kernel here uses a budget"
        reasons.append(f"error={asked.error:g} is met exactly: {why}")
    if chosen == _REFERENCE and options.kernel is None:
        reasons.append(_reasons(facts, lambda name: name != _REFERENCE and not name.endswith(_options.BUDGETED)))
    return "; ".join(reasons) or None


def _reasons(facts: dict[str, Any], wanted: Callable[[str], bool]) -> str:
    return "; ".join(
        f"{kernel['name']}: " + (", ".join(kernel["unavailable"] + kernel["declines"]) or "another kernel was named")
        for kernel in facts["kernels"]
        if kernel["takes_device"] and wanted(kernel["name"])
    )
