"""Small calls of every kind, for compute-sanitizer: each path of the kernels once, nothing else on the GPU."""

from __future__ import annotations

import torch
from binding import Backward, Forward


def filled(*shape: int) -> torch.Tensor:
    """Normal numbers by a copy from the host: torch's own kernels on the GPU would be checked, too."""
    tensor = torch.zeros(*shape, device="cuda", dtype=torch.bfloat16)
    tensor.copy_(torch.randn(shape))
    return tensor


def main() -> None:
    """Runs them; compute-sanitizer judges."""
    for dim in (64, 128, 256):
        for hq, hk, nq, nk, options in (
            (2, 1, 200, 333, {}),
            (2, 2, 257, 257, {"causal": 1}),
            (80, 80, 300, 130, {"causal": 1, "alignment": 1}),
            (1, 1, 500, 600, {"window_left": 100, "window_right": 0, "sinks": 4}),
        ):
            q, dout = filled(2, hq, nq, dim), filled(2, hq, nq, dim)
            k, v = filled(2, hk, nk, dim), filled(2, hk, nk, dim)
            out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device="cuda")
            gradients = tuple(torch.zeros_like(t) for t in (q, k, v))
            for lengths in (None, torch.tensor([nk, nk // 3]).cuda()):
                Forward(q, k, v, out, lse, key_lengths=lengths, **options)()
                torch.cuda.synchronize()
                assert out.cpu().isfinite().all()
                if dim > 128:
                    continue
                for deterministic in (0, 1):
                    Backward(
                        q,
                        k,
                        v,
                        out,
                        lse,
                        dout,
                        gradients,
                        key_lengths=lengths,
                        deterministic=deterministic,
                        **options,
                    )()
                    torch.cuda.synchronize()
                    assert all(gradient.cpu().isfinite().all() for gradient in gradients)
    print("done")


if __name__ == "__main__":
    main()
