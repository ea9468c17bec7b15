"""How far gradients of calls within a budget are from the truth, head by head: see `compare_gradients`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adaattn import _torch_calls, hf
from adaattn._options import Backward, Guarantee, make_options
from adaattn.functional import attention, reference, reference_backward
from adaattn.inspection import _attention_implementation, _has_cache, _plain

Floats = npt.NDArray[np.float64]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """One gradient against its truth, an entry per head: query heads for q, key heads for k and v."""

    error: Floats
    """||g - g*||_F / ||g*||_F; 0 where both are equal."""
    cosine: Floats
    """<g, g*> / (||g|| ||g*||), the part of the direction that is kept; 1 where both are 0."""
    norm_ratio: Floats
    """||g|| / ||g*||: below 1 a step shrinks, above 1 it grows; 1 where both are 0."""


@dataclass(frozen=True, eq=False)
class GradientErrors:
    """One attention call of batch size 1. Arrays have one entry per query head unless they say otherwise."""

    forms: npt.NDArray[np.str_]
    """As the forward pass ran: "dense", "tiled" or "low_rank"."""
    work: Floats
    """Of the forward pass, multiply-adds over those of dense attention."""
    out: Comparison
    q: Comparison
    k: Comparison
    """By key head."""
    v: Comparison
    """By key head."""

    @property
    def stability(self) -> Floats:
        """The smallest cosine of a head's gradients, those of its key head among them: 1 is the direction of the exact
        step, 0 nothing of it."""
        group = self.q.cosine.size // max(1, self.k.cosine.size)
        shared: Floats = np.repeat(np.minimum(self.k.cosine, self.v.cosine), group)
        return np.asarray(np.minimum(self.q.cosine, shared))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; what is not finite is None."""
        parts = {name: getattr(self, name) for name in ("out", "q", "k", "v")}
        return {
            "forms": self.forms.tolist(),
            "work": self.work.tolist(),
            "stability": _plain(self.stability),
            **{name: _plain(vars(part)) for name, part in parts.items()},
        }


def compare_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    *,
    error: float,
    guarantee: Guarantee = "measured",
    backward: Backward = "consistent",
    is_causal: bool = False,
    scale: float | None = None,
    kernel: str | None = None,
    truth: str = "fp64",
) -> GradientErrors:
    """Runs a call within a budget and its backward pass, and compares the results with exact ones.

    Args:
        q, k, v: (1, Hq, Nq, D), (1, Hk, Nk, D) and (1, Hk, Nk, Dv) CPU tensors.
        dout: The gradient of the output, (1, Hq, Nq, Dv) in the dtype of q.
        error, guarantee, backward, is_causal, scale, kernel: as in `adaattn.attention`.
        truth: "fp64": the FP64 reference, slow; "exact": the exact kernel, whose own error is some 1e-6 in float32.

    Raises:
        ValueError: truth is neither.
        TypeError, ValueError, NotImplementedError: as `adaattn.attention`.
    """
    if truth not in ("fp64", "exact"):
        raise ValueError(f'truth is {truth!r}, must be "fp64" or "exact"')
    same: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out, metrics = attention(
            *inputs, error=error, guarantee=guarantee, backward=backward, kernel=kernel, return_metrics=True, **same
        )
        found = torch.autograd.grad(out, inputs, dout)
    if truth == "fp64":
        true_out, _ = reference(q, k, v, **same)
        wanted: tuple[Any, ...] = reference_backward(q, k, v, dout, **same)
    else:
        options = make_options(0.0, is_causal, scale, "top_left", None, 0, None)
        true_out, lse = attention(q, k, v, return_lse=True, **same)
        wanted = _torch_calls.backward(q, k, v, None, None, true_out, lse, dout, options)
    pairs = zip((out.detach(), *found), (true_out, *wanted), strict=True)
    return GradientErrors(metrics.heads.forms[0], metrics.heads.work[0], *(_compare(a[0], b[0]) for a, b in pairs))


def random_heads(kind: str, heads: int, tokens: int, dim: int, seed: int) -> Heads:
    """q, k, v (1, heads, tokens, dim) in float32. "normal": standard normal, nothing to leave out; "local": directions
    that turn from token to token, so that a query scores high near its place alone, as in local heads of models."""
    if kind not in ("normal", "local"):
        raise ValueError(f'kind is {kind!r}, must be "normal" or "local"')
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, heads, tokens, dim, generator=generator)
    if kind == "local":
        angle = 0.004 * torch.arange(tokens)[:, None] * (torch.arange(dim) // 2 + 1)
        turning = torch.where(torch.arange(dim) % 2 == 0, angle.cos(), angle.sin())
        return turning + 0.3 * q, turning + 0.3 * k, 0.5 * turning + v
    return q, k, v


def model_heads(model: Any, ids: torch.Tensor) -> Iterator[tuple[Heads, bool, float | None]]:
    """(q, k, v), is_causal and scale of each attention call of a transformers model over one sequence (tokens,).

    Raises ValueError for calls with a mask of their own.
    """
    hf.register_transformers()
    calls: list[tuple[Heads, bool, float | None]] = []

    def keep(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0,
        scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        causal = hf._is_causal(module, query, attention_mask, is_causal)
        if attention_mask is not None and not causal:
            raise ValueError(f"the attention of layer {len(calls)} has a mask, which adaptive kernels do not take")
        heads = query.detach().float(), key.detach().float(), value.detach().float()
        calls.append((heads, causal, scaling))
        out = attention(*heads, is_causal=causal, scale=scaling, enable_gqa=True)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    with _attention_implementation(model, keep), torch.inference_mode():
        model.base_model(input_ids=ids[None], **({"use_cache": False} if _has_cache(model) else {}))
    # Inference tensors record no gradient, copies do.
    yield from (((q.clone(), k.clone(), v.clone()), causal, scale) for (q, k, v), causal, scale in calls)


def _compare(found: torch.Tensor, truth: torch.Tensor) -> Comparison:
    a, b = found.double().flatten(1), truth.double().flatten(1)
    size_a, size_b = a.norm(dim=1), b.norm(dim=1)
    difference, nothing = (a - b).norm(dim=1), (size_a == 0) & (size_b == 0)
    return Comparison(
        torch.where(difference == 0, 0.0, difference / size_b).numpy(),
        torch.where(nothing, 1.0, (a * b).sum(1) / (size_a * size_b).clamp_min(1e-300)).numpy(),
        torch.where(nothing, 1.0, size_a / size_b).numpy(),
    )
