"""Forward attention on the GPU against SDPA's FlashAttention-2 and cuDNN and, where importable, FlashAttention-3
and 4.

Interleaved within one process, medians of CUDA event times, fresh N(0, 1) inputs; also each one's error against FP64 on
a few rows. Prints a table, writes JSON. FLOP count: 4 B H Nq Nk D, halved under a causal mask. Calls on few rows are
bound by memory: TB/s are what q, k, v and out take, once each. Short calls also get the time until the call returns.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cuda"))
from binding import AdaAttnError, Forward

Run = Callable[[], torch.Tensor]
SHORT_MS = 0.05  # calls that take less wait for the host as often as for the device


def grid(dims: list[int], tokens: list[int]) -> list[dict]:
    """B N = 32,768 and H D = 2,048, as in the papers."""
    return [
        {"b": 32768 // n, "hq": 2048 // d, "hk": 2048 // d, "nq": n, "nk": n, "d": d, "causal": causal}
        for d in dims
        for causal in (False, True)
        for n in tokens
    ]


EXTRA = [
    {"b": 4, "hq": 32, "hk": 8, "nq": 4096, "nk": 4096, "d": 128, "causal": True},
    {"b": 4, "hq": 32, "hk": 8, "nq": 4096, "nk": 4096, "d": 128, "causal": False},
    {"b": 8, "hq": 8, "hk": 8, "nq": 4096, "nk": 4096, "d": 256, "causal": False},
    {"b": 8, "hq": 8, "hk": 8, "nq": 4096, "nk": 4096, "d": 256, "causal": True},
    {"b": 512, "hq": 16, "hk": 16, "nq": 128, "nk": 128, "d": 64, "causal": False},
    {"b": 1, "hq": 16, "hk": 16, "nq": 512, "nk": 512, "d": 64, "causal": True},
    {"b": 512, "hq": 16, "hk": 16, "nq": 128, "nk": 128, "d": 128, "causal": False},
    {"b": 512, "hq": 16, "hk": 16, "nq": 128, "nk": 128, "d": 64, "causal": True},
    {"b": 512, "hq": 16, "hk": 16, "nq": 128, "nk": 128, "d": 128, "causal": True},
    {"b": 8, "hq": 32, "hk": 8, "nq": 1, "nk": 32768, "d": 128, "causal": False},
    {"b": 2, "hq": 32, "hk": 32, "nq": 1, "nk": 32768, "d": 128, "causal": False},
    {"b": 1, "hq": 32, "hk": 8, "nq": 1, "nk": 32768, "d": 128, "causal": False},
    {"b": 64, "hq": 32, "hk": 8, "nq": 1, "nk": 4096, "d": 128, "causal": False},
    {"b": 8, "hq": 32, "hk": 8, "nq": 1, "nk": 32768, "d": 64, "causal": False},
    {"b": 8, "hq": 8, "hk": 4, "nq": 1, "nk": 32768, "d": 256, "causal": False},
    {"b": 8, "hq": 32, "hk": 8, "nq": 8, "nk": 32768, "d": 128, "causal": False},
    {"b": 1, "hq": 8, "hk": 8, "nq": 256, "nk": 32768, "d": 128, "causal": False},
]


def imported(module: str) -> Callable | None:
    """flash_attn_func of a FlashAttention that is installed apart from torch."""
    try:
        return importlib.import_module(module).flash_attn_func
    except (ImportError, AttributeError):
        return None


def contestants(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, kernels: list[str]
) -> tuple[dict[str, Run], dict[str, str]]:
    """What takes the problem, by name; each returns its output. Also why any of our kernels does not."""
    out = torch.empty_like(q)
    failed: dict[str, str] = {}

    def run_ours(kernel: str | None = None) -> Run:
        options = {} if kernel is None else {"kernel": kernel.encode()}
        ours = Forward(q, k, v, out, causal=int(causal), **options)

        def call() -> torch.Tensor:
            ours()
            return out

        return call

    def run_sdpa(backend: SDPBackend) -> Run:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

        return call

    def run_flash(attention: Callable) -> Run:
        qt, kt, vt = (t.transpose(1, 2).contiguous() for t in (q, k, v))

        def call() -> torch.Tensor:
            result = attention(qt, kt, vt, causal=causal)
            return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

        return call

    runs = {
        "adaattn": run_ours(),
        "cudnn": run_sdpa(SDPBackend.CUDNN_ATTENTION),
        "fa2": run_sdpa(SDPBackend.FLASH_ATTENTION),
    }
    for kernel in kernels:
        try:
            runs[kernel] = run_ours(kernel)
        except AdaAttnError as reason:
            failed[kernel] = str(reason)
    for name, module in (("fa3", "fa3_fwd_interface"), ("fa4", "flash_attn.cute")):
        if (theirs := imported(module)) is not None:
            runs[name] = run_flash(theirs)
    return runs, failed


def error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> float:
    """Relative Frobenius error over up to 256 rows of the first and last head."""
    n, nk, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    rows = torch.linspace(0, n - 1, min(n, 256), device=q.device).long()
    wrong = norm = 0.0
    for b, h in ((0, 0), (q.shape[0] - 1, q.shape[1] - 1)):
        scores = q[b, h, rows].double() @ k[b, h // group].double().T / q.shape[3] ** 0.5
        if causal:
            scores.masked_fill_(torch.arange(nk, device=q.device)[None] > rows[:, None], -torch.inf)
        want = scores.softmax(-1) @ v[b, h // group].double()
        wrong += (out[b, h, rows].double() - want).square().sum().item()
        norm += want.square().sum().item()
    return (wrong / norm) ** 0.5


def measure(runs: dict[str, Run], rounds: int, burst_ms: float) -> dict[str, float]:
    """Median milliseconds of each. In each round every contestant, in random order, first runs for burst_ms unmeasured:
    at these loads the power limit sets the clocks, and who follows a slow one would find them high."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    counts = {}
    for name, run in runs.items():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        counts[name] = max(3, min(200, int(burst_ms / begin.elapsed_time(end))))
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            for _ in range(counts[name]):
                runs[name]()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(counts[name] + 1)]
            marks[0].record()
            for mark in marks[1:]:
                runs[name]()
                mark.record()
            torch.cuda.synchronize()
            times[name] += [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return {name: statistics.median(values) for name, values in times.items()}


def host_time(run: Run) -> float:
    """Microseconds until a call returns, launches included, while the device keeps up; median of bursts."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            run()
        times.append((time.perf_counter() - start) / 50 * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def bench(case: dict, dtype: torch.dtype, rounds: int, kernels: list[str]) -> dict:
    """One row of the table."""
    b, hq, hk, nq, nk, d, causal = (case[key] for key in ("b", "hq", "hk", "nq", "nk", "d", "causal"))
    q = torch.randn(b, hq, nq, d, device="cuda", dtype=dtype)
    k, v = (torch.randn(b, hk, nk, d, device="cuda", dtype=dtype) for _ in range(2))
    flop = 4 * b * hq * nq * nk * d / (2 if causal else 1)
    (runs, failed), errors = contestants(q, k, v, causal, kernels), {}
    for name, run in list(runs.items()):
        try:
            errors[name] = error(run(), q, k, v, causal)
        except (RuntimeError, ValueError) as reason:
            failed[name] = str(reason).splitlines()[0]
            del runs[name]
    times = measure(runs, rounds, 40.0)
    moved = 2 * (2 * q.numel() + 2 * k.numel())  # bytes
    return case | {
        "chosen": Forward(q, k, v, torch.empty_like(q), causal=int(causal)).chosen(),
        "ms": times,
        "tb_per_s": {n: moved / t * 1e-9 for n, t in times.items()},
        "host_us": {n: host_time(run) for n, run in runs.items() if times[n] < SHORT_MS},
        "tflops": {n: flop / t * 1e-9 for n, t in times.items()},
        "error": errors,
        "failed": failed,
    }


def gemm_ceiling() -> float:
    """TFLOP/s of an 8192^3 bf16 product: what anything exact is held against."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / measure({"gemm": lambda: a @ b}, 3, 100.0)["gemm"] * 1e-9


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-extra", action="store_true", help="only the grid")
    parser.add_argument("--kernels", nargs="*", default=[], help="rows of our table that join, by name")
    args = parser.parse_args()
    cases = grid(args.dims, args.tokens) + ([] if args.no_extra else EXTRA)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": args.dtype,
        "gemm_tflops": gemm_ceiling(),
        "rows": [],
    }
    print(f"{report['device']}, {args.dtype}, GEMM {report['gemm_tflops']:.0f} TFLOP/s; TFLOP/s, then relative errors")
    for case in cases:
        row = bench(case, getattr(torch, args.dtype), args.rounds, args.kernels)
        report["rows"].append(row)
        name = "b{b} h{hq}/{hk} n{nq}/{nk} d{d}".format(**case) + (" causal" if case["causal"] else "")
        speeds = "  ".join(f"{n} {t:6.1f}" for n, t in row["tflops"].items())
        print(
            f"{name:36} {speeds}   " + " ".join(f"{e:.2e}" for e in row["error"].values()),
            *row["failed"].values(),
            flush=True,
        )
        if case["nq"] <= 16:
            print(f"{'':36} " + "  ".join(f"{n} {t:6.2f}" for n, t in row["tb_per_s"].items()), "TB/s", flush=True)
        if row["host_us"]:
            print(f"{'':36} " + "  ".join(f"{n} {t:6.1f}" for n, t in row["host_us"].items()), "us a call", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
