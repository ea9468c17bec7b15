"""Small forward calls of every kind, for compute-sanitizer: each path of the kernels once, nothing else on the GPU."""

from __future__ import annotations

import torch
from binding import Forward


def main() -> None:
    """Runs them; compute-sanitizer judges."""
    for dim in (64, 128, 256):
        for hq, hk, nq, nk, options in (
            (2, 1, 200, 333, {}),
            (2, 2, 257, 257, {"causal": 1}),
            (80, 80, 300, 130, {"causal": 1, "alignment": 1}),
            (1, 1, 500, 600, {"window_left": 100, "window_right": 0, "sinks": 4}),
        ):
            q = torch.zeros(2, hq, nq, dim, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.zeros(2, hk, nk, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            for tensor in (q, k, v):
                tensor.copy_(torch.randn(tensor.shape))
            out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device="cuda")
            lengths = torch.tensor([nk, nk // 3]).cuda()
            Forward(q, k, v, out, lse, **options)()
            Forward(q, k, v, out, lse, key_lengths=lengths, **options)()
            torch.cuda.synchronize()
            assert out.cpu().isfinite().all()
    print("done")


if __name__ == "__main__":
    main()
