"""Float32 forward attention on the GPU against SDPA's memory-efficient backend: as bench/cuda/forward.py measures.

TF32 is off for the contestant that counts, "efficient"; "tf32" is the same with it on, for its speed and error. Also
each one's largest error against FP64 on up to 256 rows of two heads, and a bf16 product's TFLOP/s: a third of it is the
ceiling of three bf16 products for one. FLOP count: 4 B H Nq Nk D, halved under a causal mask.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from forward import Run, gemm_ceiling, grid, measure  # which also puts binding on the path
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from binding import AdaAttnError, Forward  # isort: skip

EXTRA = [
    {"b": 2, "hq": 32, "hk": 8, "nq": 4096, "nk": 4096, "d": 128, "causal": True},
    {"b": 4, "hq": 16, "hk": 16, "nq": 4096, "nk": 4096, "d": 80, "causal": False},
]


def contestants(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, kernels: list[str]
) -> tuple[dict[str, Run], dict[str, str]]:
    """What takes the problem, by name; each returns its output. Also why any of our kernels does not."""
    failed: dict[str, str] = {}
    group = q.shape[1] // k.shape[1]
    repeated = [t.repeat_interleave(group, 1) for t in (k, v)]  # this backend takes no grouped heads

    def run_ours(kernel: str | None = None) -> Run:
        out = torch.empty_like(q)
        options = {} if kernel is None else {"kernel": kernel.encode()}
        ours = Forward(q, k, v, out, causal=int(causal), **options)

        def call() -> torch.Tensor:
            ours()
            return out

        return call

    def run_efficient(tf32: bool) -> Run:
        def call() -> torch.Tensor:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                return sdpa(q, *repeated, is_causal=causal)

        return call

    runs = {"adaattn": run_ours(), "efficient": run_efficient(False), "tf32": run_efficient(True)}
    for kernel in kernels:
        try:
            runs[kernel] = run_ours(kernel)
        except AdaAttnError as reason:
            failed[kernel] = str(reason)
    return runs, failed


def largest_error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> float:
    """Over up to 256 rows of the first and last head."""
    n, nk, group, worst = q.shape[2], k.shape[2], q.shape[1] // k.shape[1], 0.0
    rows = torch.linspace(0, n - 1, min(n, 256), device=q.device).long()
    for b, h in ((0, 0), (q.shape[0] - 1, q.shape[1] - 1)):
        scores = q[b, h, rows].double() @ k[b, h // group].double().T / math.sqrt(q.shape[3])
        if causal:
            scores.masked_fill_(torch.arange(nk, device=q.device)[None] > rows[:, None], -torch.inf)
        want = scores.softmax(-1) @ v[b, h // group].double()
        worst = max(worst, (out[b, h, rows].double() - want).abs().max().item())
    return worst


def bench(case: dict, rounds: int, kernels: list[str]) -> dict:
    """One row of the table."""
    b, hq, hk, nq, nk, d, causal = (case[key] for key in ("b", "hq", "hk", "nq", "nk", "d", "causal"))
    q, k, v = (torch.randn(b, h, n, d, device="cuda") for h, n in ((hq, nq), (hk, nk), (hk, nk)))
    flop = 4 * b * hq * nq * nk * d / (2 if causal else 1)
    (runs, failed), errors = contestants(q, k, v, causal, kernels), {}
    for name, run in list(runs.items()):
        try:
            errors[name] = largest_error(run(), q, k, v, causal)
        except (RuntimeError, ValueError) as reason:
            failed[name] = str(reason).splitlines()[0]
            del runs[name]
    times = measure(runs, rounds, 40.0)
    return case | {
        "chosen": Forward(q, k, v, torch.empty_like(q), causal=int(causal)).chosen(),
        "ms": times,
        "tflops": {n: flop / t * 1e-9 for n, t in times.items()},
        "largest_error": errors,
        "failed": failed,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-extra", action="store_true", help="only the grid")
    parser.add_argument("--kernels", nargs="*", default=[], help="rows of our table that join, by name")
    args = parser.parse_args()
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": "float32",
        "gemm_tflops": gemm_ceiling(),  # of bfloat16
        "rows": [],
    }
    print(f"{report['device']}, float32; a bf16 product {report['gemm_tflops']:.0f}; TFLOP/s, then largest errors")
    for case in grid(args.dims, args.tokens) + ([] if args.no_extra else EXTRA):
        row = bench(case, args.rounds, args.kernels)
        report["rows"].append(row)
        name = "b{b} h{hq}/{hk} n{nq}/{nk} d{d}".format(**case) + (" causal" if case["causal"] else "")
        speeds = "  ".join(f"{n} {t:6.1f}" for n, t in row["tflops"].items())
        errors = " ".join(f"{e:.2e}" for e in row["largest_error"].values())
        print(f"{name:36} {speeds}   {errors}", *row["failed"].values(), flush=True)
    ratios = {
        n: [r["tflops"]["adaattn"] / r["tflops"]["efficient"] for r in report["rows"] if r["nq"] == n]
        for n in args.tokens
        if all({"adaattn", "efficient"} <= r["tflops"].keys() for r in report["rows"] if r["nq"] == n)
    }
    for n, values in ratios.items():
        mean = statistics.geometric_mean(values)
        print(f"N {n}: {mean:.2f}x efficient in the geometric mean, at least {min(values):.2f}x")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
