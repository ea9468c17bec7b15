"""What src/cuda/sm90/int8 computes, in torch, on any device: bytes, scales, scores of bytes. Run as a program, prints
the errors that it predicts on the CPU.

Queries and keys are rounded as the kernel rounds them, so that scores agree but for float32 rounding. Probabilities and
values are not: their roundings, of 2^-9 and of powers by products, are in the tests' tolerances.
"""

from __future__ import annotations

import math

import torch

MEAN_ROWS = 64
LEAST_SCALE = 2.0**-66


def byte_scale(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """The scale that brings the largest magnitude over axes to 127, in float32 as the kernel has it."""
    largest = values.abs().amax(axes, keepdim=True).float()
    return (largest * torch.tensor(1 / 127, dtype=torch.float32)).clamp(min=LEAST_SCALE)


def to_bytes(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounded values over scale, as float64 integers."""
    return (values.double() * (1 / scale).double()).round()


def tile_keys(dim: int, value_dim: int) -> int:
    """Keys that share a scale, by the head sizes of queries and of values."""
    return 128 if max(dim, value_dim) <= 64 else 80


def sampled_mean(k: torch.Tensor) -> torch.Tensor:
    """Mean of up to MEAN_ROWS evenly spaced rows of [n, d], in float32."""
    n = k.shape[0]
    rows = min(n, MEAN_ROWS)
    return k[torch.arange(rows, device=k.device) * n // rows].float().mean(0)


def head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [nq, dv] and lse [nq] in float64 of one head; k and v end at the key length, seen is [nq, nk]."""
    nq, nk = q.shape[0], k.shape[0]
    if nk == 0:
        return q.new_zeros(nq, v.shape[1], dtype=torch.float64), q.new_full((nq,), -math.inf, dtype=torch.float64)
    mean = sampled_mean(k)
    q_scale = byte_scale(q, (1,))
    q8 = to_bytes(q.float(), q_scale)
    centred = k.float() - mean
    k8 = torch.empty_like(centred, dtype=torch.float64)
    k_scale = torch.empty(nk, 1, dtype=torch.float32, device=k.device)
    tile = tile_keys(q.shape[1], v.shape[1])
    for first in range(0, nk, tile):
        part = centred[first : first + tile]
        k_scale[first : first + tile] = byte_scale(part, (0, 1))
        k8[first : first + tile] = to_bytes(part, k_scale[first])
    scores = (q8 @ k8.T) * (q_scale.double() * scale) * k_scale.double().T
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(1)
    p = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[:, None])
    return p @ v.double(), lse + (q.double() @ mean.double()) * scale


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None = None,
    key_lengths: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for [b, h, n, d]; seen broadcasts to [b, 1, nq, nk]."""
    b, hq, nq, d = q.shape
    nk, group = k.shape[2], hq // k.shape[1]
    seen = seen.expand(b, 1, nq, nk)
    out = torch.empty(b, hq, nq, v.shape[3], dtype=torch.float64, device=q.device)
    lse = torch.empty(b, hq, nq, dtype=torch.float64, device=q.device)
    for i in range(b):
        n = nk if key_lengths is None else key_lengths[i]
        for h in range(hq):
            keys, values = k[i, h // group, :n], v[i, h // group, :n]
            out[i, h], lse[i, h] = head(q[i, h], keys, values, seen[i, 0, :, :n], d**-0.5 if scale is None else scale)
    return out, lse


def samples(kind: str, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bfloat16 q, k, v [n, d]: N(0, 1), with outliers (1 in 1,000 from N(0, 100)), with biased channels, peaky."""
    q, k, v = (torch.randn(n, d) for _ in range(3))
    if kind == "outliers":
        q, k, v = (t + 10 * torch.randn(n, d) * (torch.rand(n, d) < 1e-3) for t in (q, k, v))
    if kind == "bias":
        k = k + 8 * torch.randn(d) * (torch.rand(d) < 0.1)
        v = v + torch.randn(d)
    if kind == "peaky":
        q = 2.5 * q
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def main() -> None:
    """The table."""
    torch.manual_seed(0)
    for d in (64, 128):
        for n in (1024, 8192):
            for kind in ("normal", "outliers", "bias", "peaky"):
                q, k, v = samples(kind, n, d)
                q = q[:512]
                out, lse = head(q, k, v, torch.ones(len(q), n, dtype=torch.bool), d**-0.5)
                scores = q.double() @ k.double().T * d**-0.5
                want = scores.softmax(-1) @ v.double()
                error = ((out - want).norm() / want.norm()).item()
                off = (lse - scores.logsumexp(-1)).abs().max().item()
                print(f"D {d:3} N {n:5} {kind:9} relative error {error:.2e}, lse off by at most {off:.1e}")


if __name__ == "__main__":
    main()
