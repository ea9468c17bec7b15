"""Heads for tests of budgets, made on the GPU from seeds: those of bench/budget/cases.py, and two that lose blocks."""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench" / "budget"))
import cases


def near(s: cases.Source) -> cases.Heads:
    """Queries find the hundred keys around their own place, all others score 10 nats less: in the span of 32 columns,
    which a screen of rank 32 holds whole."""
    angle = torch.arange(s.tokens, device=s.device)[:, None] * 0.002 * torch.arange(1, 17, device=s.device)
    place = torch.zeros(s.tokens, s.dim, device=s.device)
    place[:, :32] = torch.stack([angle.cos(), angle.sin()], -1).reshape(s.tokens, 32)
    place *= (14 * math.sqrt(s.dim) / 16) ** 0.5  # so that a query scores 14 nats at its own place
    return place + 0.3 * s.normal(), place + 0.3 * s.normal(), s.normal()


def near_and_sinks(s: cases.Source) -> cases.Heads:
    """The same, and four first keys that all queries find."""
    q, k, v = near(s)
    u = s.direction()
    k[:, :, :4] += 8 * u
    v[:, :, :4] *= 0.05
    return q + 8 * u, k, v


KINDS = {kind.__name__: kind for kind in [near, near_and_sinks, *cases.USUAL, *cases.HOSTILE]}
REAL_LIKE = ("normal", "outlier_channels", "key_bias", "peaked", "sinks", "video", "local")
SAVES = ("near", "near_and_sinks", "video")  # of most queries most blocks hold less than a thousandth


@lru_cache(maxsize=4)
def heads(kind: str, tokens: int, dim: int, dtype: torch.dtype, q_heads: int = 4, k_heads: int = 4) -> cases.Heads:
    """q, k and v of a kind; with fewer key heads, every so many-th."""
    q, k, v = KINDS[kind](cases.Source(f"{kind}/{tokens}/{dim}", dim, tokens, q_heads, "cuda"))
    step = q_heads // k_heads
    return q.to(dtype), k[:, ::step].to(dtype).contiguous(), v[:, ::step].to(dtype).contiguous()
