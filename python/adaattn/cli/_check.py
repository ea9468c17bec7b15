"""Runs one case on one kernel and compares it with the FP64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import adaattn
from adaattn import _options
from adaattn._tolerance import backward_tolerance, forward_tolerance, lse_tolerance
from adaattn.cli._cases import Arrays, Case

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """error over its tolerance, the worst of what was compared; or why nothing was compared."""

    ratio: float | None
    reason: str = ""

    @property
    def passed(self) -> bool | None:
        """None if nothing was compared."""
        return None if self.ratio is None else self.ratio <= 1


def check(case: Case, arrays: Arrays, kernel: dict[str, Any]) -> Outcome:
    """kernel is an entry of describe()["kernels"]."""
    if kernel["operation"] == "backward" and case.options.get("error"):
        return Outcome(None, "calls within a budget record no gradient")
    if kernel["unavailable"]:
        return Outcome(None, "; ".join(kernel["unavailable"]))
    try:
        convert = _converter(case.dtype, kernel["device"])
    except ImportError as error:
        return Outcome(None, f"needs {error.name}")
    tensors = {name: x if name == "attn_mask" else convert(x) for name, x in arrays.items()}
    if "attn_mask" in tensors:
        tensors["attn_mask"] = _like(tensors["q"], arrays["attn_mask"])
    try:
        if kernel["operation"] == "forward":
            return Outcome(_forward_ratio(case, tensors, kernel["name"]))
        return Outcome(_backward_ratio(case, tensors, kernel["name"]))
    except NotImplementedError as error:
        return Outcome(None, str(error))


def relative_error(result: Array, truth: Array, scale: Array | None = None) -> float:
    """The largest relative Frobenius error of a head; NaN counts as infinite, and a truth of 0 must be met exactly."""
    if truth.size == 0:
        return 0.0
    errors = np.linalg.norm(result - truth, axis=(-2, -1))
    sizes = np.linalg.norm(truth, axis=(-2, -1)) if scale is None else scale
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(errors == 0, 0.0, errors / sizes)
    return float(np.nan_to_num(ratios, nan=np.inf, posinf=np.inf).max())


def _forward_ratio(case: Case, tensors: dict[str, Any], kernel: str) -> float:
    q, k, v = (tensors[name] for name in "qkv")
    keywords = {"enable_gqa": True, "attn_mask": tensors.get("attn_mask"), **case.options}
    out, lse = adaattn.attention(q, k, v, return_lse=True, kernel=kernel, **keywords)
    exact = {name: value for name, value in keywords.items() if name not in ("error", "guarantee")}
    true_out, true_lse = _truth(adaattn.reference, (q, k, v), exact)
    dim, keys = case.q[3], case.keys[1]
    tolerance = forward_tolerance(case.dtype, dim, keys, case.score_size)
    if kernel.endswith(_options.BUDGETED):  # the budget is for the output before rounding, and for it alone
        return relative_error(_float64(out), true_out) / (float(case.options["error"]) + tolerance)
    ratio = relative_error(_float64(out), true_out) / tolerance
    seen = np.isfinite(true_lse)
    lse = _float64(lse)
    if not np.array_equal(lse[~seen], true_lse[~seen]):
        return float("inf")
    if seen.any():
        tolerance = lse_tolerance(dim, keys, float(np.abs(true_lse[seen]).max()), case.score_size)
        ratio = max(ratio, float(np.abs(lse[seen] - true_lse[seen]).max()) / tolerance)
    return ratio


def _backward_ratio(case: Case, tensors: dict[str, Any], kernel: str) -> float:
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    mask = tensors.get("attn_mask")
    keywords = {"enable_gqa": True, "attn_mask": mask, **case.options}
    out, lse = adaattn.attention(q, k, v, return_lse=True, **keywords)
    settings = {"error": 0.0, "is_causal": False, "scale": None, "alignment": "top_left", "window": None, "sinks": 0}
    options = _options.make_options(
        **{name: case.options.get(name, default) for name, default in settings.items()}, kernel=kernel
    )
    lengths = case.options.get("key_lengths")
    if isinstance(q, np.ndarray):
        from adaattn import _numpy_calls

        gradients: Any = _numpy_calls.backward(q, k, v, mask, lengths, out, lse, dout, options)
    else:
        from adaattn import _torch_calls

        gradients = _torch_calls.backward(q, k, v, mask, lengths, out, lse, dout, options)
    truths = _truth(adaattn.reference_backward, (q, k, v, dout), keywords)
    tolerance = backward_tolerance(case.dtype, case.q[3], case.rows, case.score_size)
    return max(
        relative_error(_float64(gradient), truth) / tolerance for gradient, truth in zip(gradients, truths, strict=True)
    )


def _truth(function: Any, tensors: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Array, ...]:
    on_cpu = {name: x.cpu() if hasattr(x, "cpu") else x for name, x in keywords.items()}
    results = function(*(x.cpu() if hasattr(x, "cpu") else x for x in tensors), **on_cpu)
    return tuple(np.asarray(result) for result in results)


def _float64(value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    return np.asarray(value.detach().cpu().double())


def _converter(dtype: str, device: str) -> Any:
    """A function from float32 arrays to what the kernel takes, keeping strides. Raises ImportError."""
    if device == "cpu" and dtype != "bfloat16":
        return lambda array: array.astype(dtype)
    if device == "cpu":
        try:
            import ml_dtypes
        except ImportError:  # torch has the type, too
            pass
        else:
            return lambda array: array.astype(ml_dtypes.bfloat16)
    import torch

    return lambda array: torch.from_numpy(array).to(device, getattr(torch, dtype))


def _like(q: Any, array: Array) -> Any:
    if isinstance(q, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).to(q.device)
