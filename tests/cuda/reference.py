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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, Nq, Dv] and lse [B, H, Nq] in FP64; seen broadcasts to [B, H, Nq, Nk]. Unseen keys do not count,
    rows that see none are 0 with lse -inf."""
    group = q.shape[1] // k.shape[1]
    k64 = k.double().repeat_interleave(group, 1)
    v64 = v.double().repeat_interleave(group, 1)
    scores = q.double() @ k64.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    return p @ v64, lse


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv in FP64."""
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        out, _ = attention(inputs[0], inputs[1], inputs[2], seen, scale)
    return torch.autograd.grad(out, inputs, dout.double())
