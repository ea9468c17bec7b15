"""FP64 attention on the GPU: the truth of the tests, written with plain torch operations."""

from __future__ import annotations

import math

import torch


def visible(
    nq: int,
    nk: int,
    *,
    causal: bool = False,
    bottom_right: bool = False,
    left: int = -1,
    right: int = -1,
    sinks: int = 0,
) -> torch.Tensor:
    """[nq, nk]: which keys each query sees."""
    diagonal = torch.arange(nq, device="cuda")[:, None] + (nk - nq if bottom_right else 0)
    key = torch.arange(nk, device="cuda")[None, :]
    reach = 0 if causal else right
    seen = torch.ones(nq, nk, dtype=torch.bool, device="cuda")
    if reach >= 0:
        seen &= key <= diagonal + reach
    if left >= 0:
        limit = (key >= diagonal - left) | (key < sinks)
        seen &= limit
    return seen


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, Nq, Dv] and lse [B, H, Nq] in FP64; seen and bias broadcast to [B, H, Nq, Nk]. Unseen keys do not
    count, rows that see none are 0 with lse -inf."""
    p, lse = softmax(q, k, seen, scale, bias)
    return p @ v.double().repeat_interleave(q.shape[1] // k.shape[1], 1), lse


def by_head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    bottom_right: bool = False,
    kept: torch.Tensor | None = None,
    scale: float | None = None,
    rows: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Hq, Nq, Dv] and lse [B, Hq, Nq] in FP64 as `attention`, but head by head and so many queries at a time:
    for sequences whose scores do not fit into memory. kept [B, Hq, Nq / 64, Nk / 128], both rounded up: which blocks of
    keys count for which 64 queries."""
    (b, hq, nq, dim), nk, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    out = torch.zeros(b, hq, nq, v.shape[3], dtype=torch.float64, device=q.device)
    lse = torch.empty(b, hq, nq, dtype=torch.float64, device=q.device)
    diagonal = nk - nq if bottom_right else 0
    key = torch.arange(nk, device=q.device)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    for i in range(b * hq):
        at = divmod(i, hq)
        k64, v64 = (t[at[0], at[1] // group].double() for t in (k, v))
        for first in range(0, nq, rows):
            part = slice(first, min(first + rows, nq))
            end = min(nk, max(part.stop + diagonal, 0)) if causal else nk  # no query of the part sees keys from it on
            scores = q[at][part].double() @ k64[:end].T * scale
            if causal:
                query = torch.arange(part.start, part.stop, device=q.device)[:, None]
                scores.masked_fill_(key[:end] > query + diagonal, -math.inf)
            if kept is not None:
                strips = kept[at].repeat_interleave(64, 0)[part].repeat_interleave(128, 1)
                scores.masked_fill_(~strips[:, :end], -math.inf)
            sums = torch.logsumexp(scores, -1)
            lse[at][part] = sums
            p = scores.sub_(torch.where(sums == -math.inf, 0.0, sums)[:, None]).exp_()
            out[at][part] = p @ v64[:end]
    return out, lse


def softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, H, Nq, Nk] and lse [B, H, Nq] of the same."""
    k64 = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k64.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None]), lse


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv in FP64."""
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        out, _ = attention(inputs[0], inputs[1], inputs[2], seen, scale, bias)
    return torch.autograd.grad(out, inputs, dout.double())
