"""The FP64 output that errors are measured against, kept in a folder once computed: all rows of all heads.

`adaattn.reference` is the definition; at 8,192 tokens it takes minutes a head, so this is the same in blocks of rows by
torch's float64 products. `python truth.py` holds one against the other.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from cases import Heads

_ROWS = 512


def attention_fp64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """(1, Hq, N, Dv) float64 of (1, H, N, D) inputs with as many queries as keys."""
    _, heads, n, dim = q.shape
    out = torch.empty(1, heads, n, v.shape[3], dtype=torch.float64)
    for head in range(heads):
        key_head = head * k.shape[1] // heads
        keys, values = k[0, key_head].double(), v[0, key_head].double()
        for first in range(0, n, _ROWS):
            last = min(first + _ROWS, n)
            seen = last if causal else n
            scores = q[0, head, first:last].double() @ keys[:seen].T / math.sqrt(dim)
            if causal:
                hidden = torch.arange(seen)[None] > torch.arange(first, last)[:, None]
                scores.masked_fill_(hidden, -math.inf)
            out[0, head, first:last] = scores.softmax(-1) @ values[:seen]
    return out


def true_output(heads: Heads, causal: bool, cache: Path) -> torch.Tensor:
    """The same, rounded to float32 (6e-8 of it), from the folder if it was computed before for equal inputs."""
    digest = hashlib.blake2b(str(causal).encode(), digest_size=16)
    for tensor in heads:
        digest.update(tensor.contiguous().numpy())
    file = cache / "truth" / f"{digest.hexdigest()}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".part")
        torch.save(attention_fp64(*heads, causal).float(), temporary)
        temporary.rename(file)
    return torch.load(file)


def head_errors(out: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """Relative Frobenius error of each head; a head whose truth is 0 is right only if it is 0."""
    wrong = (out.double() - truth.double()).flatten(2).norm(dim=-1)[0]
    size = truth.double().flatten(2).norm(dim=-1)[0]
    return [w / s if s else (0.0 if w == 0 else math.inf) for w, s in zip(wrong.tolist(), size.tolist(), strict=True)]


def main() -> None:
    import adaattn

    generator = torch.Generator().manual_seed(0)
    for causal in (False, True):
        q = 3 * torch.randn(1, 4, 700, 64, generator=generator)
        k, v = (torch.randn(1, 2, 700, 64, generator=generator) for _ in range(2))
        want, _ = adaattn.reference(q, k, v, is_causal=causal, enable_gqa=True)
        error = max(head_errors(attention_fp64(q, k, v, causal), want))
        print(f"causal={causal}: {error:.1e} from adaattn.reference")
        # Both sum 700 terms in FP64 in their own order: 700 u = 8e-14.
        if error > 1e-13:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
