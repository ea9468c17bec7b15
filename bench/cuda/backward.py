"""Backward attention on the GPU against SDPA's FlashAttention-2 and cuDNN, in float32 its memory-efficient backend: as
bench/cuda/forward.py measures, from an output that is there already. Also each one's errors against FP64 on one head.
FLOP count: 10 B H Nq Nk D, halved under a causal mask."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from forward import gemm_ceiling, grid, measure  # which also puts binding on the path
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from binding import Backward, Forward  # isort: skip

EXTRA = [
    {"b": 4, "hq": 32, "hk": 8, "nq": 4096, "nk": 4096, "d": 128, "causal": True},
    {"b": 4, "hq": 32, "hk": 8, "nq": 4096, "nk": 4096, "d": 128, "causal": False},
    {"b": 8, "hq": 8, "hk": 8, "nq": 4096, "nk": 4096, "d": 256, "causal": True},
    {"b": 8, "hq": 8, "hk": 8, "nq": 4096, "nk": 4096, "d": 256, "causal": False},
    {"b": 512, "hq": 16, "hk": 16, "nq": 128, "nk": 128, "d": 64, "causal": False},
    {"b": 1, "hq": 16, "hk": 16, "nq": 512, "nk": 512, "d": 64, "causal": True},
]


def contestants(q, k, v, dout, causal: bool, kernels: list[str]) -> dict:
    """What takes the problem, by name; each returns dq, dk and dv."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    Forward(q, k, v, out, lse, causal=int(causal))()

    def ours(deterministic: int, kernel: str | None = None):
        gradients = tuple(torch.empty_like(t) for t in (q, k, v))
        options = {"causal": int(causal), "deterministic": deterministic}
        if kernel is not None:
            options["kernel"] = kernel.encode()
        call = Backward(q, k, v, out, lse, dout, gradients, **options)

        def run():
            call()
            return gradients

        return run

    def theirs(backend: SDPBackend):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(backend):
            result = sdpa(*inputs, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return lambda: torch.autograd.grad(result, inputs, dout, retain_graph=True)

    makers = {
        "adaattn": lambda: ours(0),
        "deterministic": lambda: ours(1),
        "cudnn": lambda: theirs(SDPBackend.CUDNN_ATTENTION),
        "fa2": lambda: theirs(SDPBackend.FLASH_ATTENTION),
    }
    for kernel in kernels:
        makers[kernel] = lambda kernel=kernel: ours(0, kernel)
        makers[f"{kernel} deterministic"] = lambda kernel=kernel: ours(1, kernel)
    if q.dtype == torch.float32:  # which the others do not take
        makers["efficient"] = lambda: theirs(SDPBackend.EFFICIENT_ATTENTION)
    runs, failed = {}, {}
    for name, make in makers.items():
        try:
            runs[name] = make()
            runs[name]()
        except (RuntimeError, ValueError) as reason:
            runs.pop(name, None)
            failed[name] = str(reason).splitlines()[0]
    return {"runs": runs, "failed": failed}


def truth(q, k, v, dout, causal: bool):
    """dq of the first group of query heads, dk and dv of the first key head, of the first batch entry, in FP64."""
    group = q.shape[1] // k.shape[1]
    q, dout = q[0, :group].double(), dout[0, :group].double()
    k, v = k[0, :1].double(), v[0, :1].double()
    scale = 1 / math.sqrt(q.shape[-1])
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for h in range(group):  # one N x N matrix at a time
        scores = q[h] @ k[0].T * scale
        if causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -math.inf)
        p = torch.softmax(scores, -1)
        del scores
        dv[0] += p.T @ dout[h]
        ds = dout[h] @ v[0].T
        ds -= (p * ds).sum(-1, keepdim=True)
        ds *= p * scale
        del p
        dq[h] = ds @ k[0]
        dk[0] += ds.T @ q[h]
    return dq, dk[0], dv[0]


def errors(gradients, want) -> list[float]:
    """Relative Frobenius errors of dq, dk and dv."""
    got = gradients[0][0, : want[0].shape[0]], gradients[1][0, 0], gradients[2][0, 0]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]


def bench(case: dict, dtype: torch.dtype, rounds: int, kernels: list[str]) -> dict:
    """One row of the table."""
    b, hq, hk, nq, nk, d, causal = (case[key] for key in ("b", "hq", "hk", "nq", "nk", "d", "causal"))
    q, dout = (torch.randn(b, hq, nq, d, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(b, hk, nk, d, device="cuda", dtype=dtype) for _ in range(2))
    flop = 10 * b * hq * nq * nk * d / (2 if causal else 1)
    found = contestants(q, k, v, dout, causal, kernels)
    wrong = {}
    if nq * nk <= 8192**2:
        want = truth(q, k, v, dout, causal)
        wrong = {name: errors(run(), want) for name, run in found["runs"].items()}
        del want
        torch.cuda.empty_cache()
    times = measure(found["runs"], rounds, 40.0)
    return case | {
        "ms": times,
        "tflops": {n: flop / t * 1e-9 for n, t in times.items()},
        "error": wrong,
        "failed": found["failed"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-extra", action="store_true", help="only the grid")
    parser.add_argument("--kernels", nargs="*", default=[], help="rows of our table that join, by name")
    args = parser.parse_args()
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": args.dtype,
        "gemm_tflops": gemm_ceiling(),
        "rows": [],
    }
    print(f"{report['device']}, {args.dtype}, GEMM {report['gemm_tflops']:.0f} TFLOP/s; TFLOP/s, then dq dk dv errors")
    for case in grid(args.dims, args.tokens) + ([] if args.no_extra else EXTRA):
        row = bench(case, getattr(torch, args.dtype), args.rounds, args.kernels)
        report["rows"].append(row)
        name = "b{b} h{hq}/{hk} n{nq}/{nk} d{d}".format(**case) + (" causal" if case["causal"] else "")
        speeds = "  ".join(f"{n} {t:6.1f}" for n, t in row["tflops"].items())
        wrong = "  ".join(" ".join(f"{e:.1e}" for e in three) for three in row["error"].values())
        print(f"{name:36} {speeds}   {wrong}", *row["failed"].values(), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
