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
