"""8-bit attention on the GPU against the best exact kernel: ours, cuDNN's, FlashAttention-2's and, if importable, 3's.

Interleaved as in forward.py, everything from 16-bit inputs to output counted; the pre-pass is shown apart as well, by
the profiler. Ratios are to the fastest exact one of the same row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from forward import Run, contestants, error, grid, measure

NAMES = ["sm90_int8"]
EXTRA = [
    {"b": 4, "hq": 32, "hk": 8, "nq": 8192, "nk": 8192, "d": 128, "causal": True},
    {"b": 4, "hq": 32, "hk": 8, "nq": 8192, "nk": 8192, "d": 128, "causal": False},
]


def kernel_times(run: Run, calls: int = 5) -> dict[str, float]:
    """Microseconds of each kernel of a call, by its name; empty where there is no profiler."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                run()
            torch.cuda.synchronize()
        return {event.key: event.device_time_total / calls for event in profile.key_averages()}
    except RuntimeError:
        return {}


def prepass_us(times: dict[str, float]) -> float:
    """What a call spends before attention itself."""
    return sum(us for name, us in times.items() if "quantize_" in name or "convert_values" in name)


def bench(case: dict, dtype: torch.dtype, rounds: int, kernels: list[str]) -> dict:
    """One row of the table."""
    b, hq, hk, nq, nk, d, causal = (case[key] for key in ("b", "hq", "hk", "nq", "nk", "d", "causal"))
    q = torch.randn(b, hq, nq, d, device="cuda", dtype=dtype)
    k, v = (torch.randn(b, hk, nk, d, device="cuda", dtype=dtype) for _ in range(2))
    runs, failed = contestants(q, k, v, causal, kernels)
    errors = {}
    for name, run in list(runs.items()):
        try:
            errors[name] = error(run(), q, k, v, causal)
        except (RuntimeError, ValueError) as reason:
            failed[name] = str(reason).splitlines()[0]
            del runs[name]
    times = measure(runs, rounds, 40.0)
    profiles = {name: kernel_times(runs[name]) for name in kernels if name in runs}
    exact = min(time for name, time in times.items() if name not in kernels)
    flop = 4 * b * hq * nq * nk * d / (2 if causal else 1)
    return case | {
        "ms": times,
        "tflops": {name: flop / time * 1e-9 for name, time in times.items()},
        "over_best_exact": {name: exact / times[name] for name in kernels if name in times},
        "error": errors,
        "prepass_us": {name: prepass_us(profile) for name, profile in profiles.items()},
        "kernels_us": profiles,
        "failed": failed,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192, 16384, 32768])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", nargs="*", default=NAMES)
    parser.add_argument("--no-extra", action="store_true", help="only the grid")
    args = parser.parse_args()
    rows = []
    print("TFLOP/s; of the 8-bit kernels also: times the best exact one, relative error, pre-pass in us")
    for case in grid(args.dims, args.tokens) + ([] if args.no_extra else EXTRA):
        row = bench(case, getattr(torch, args.dtype), args.rounds, args.kernels)
        rows.append(row)
        name = "b{b} h{hq}/{hk} n{nq}/{nk} d{d}".format(**case) + (" causal" if case["causal"] else "")
        print(name, "  ".join(f"{n} {t:.0f}" for n, t in row["tflops"].items() if n not in args.kernels))
        for kernel, ratio in row["over_best_exact"].items():
            print(
                f"  {kernel:24} {row['tflops'][kernel]:6.0f} {ratio:5.2f}x {row['error'][kernel]:.2e}"
                f" {row['prepass_us'][kernel]:6.0f}"
            )
        print(*row["failed"].values(), end="\n" if row["failed"] else "", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
