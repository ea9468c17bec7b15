"""Attention within an error budget on the GPU against the best exact one: real heads, and N(0, 1) as the worst case.

Real heads are those of gpt8k (--gpt8k), all its layers at 8,192 tokens with a batch of sequences, and of files that
torch.save wrote (--heads): lists of {"name", "q" [1, Hq, N, D], "k", "v" [1, Hk, N, D]}, causal, repeated along the
batch. For each budget: milliseconds as in forward.py, everything from 16-bit inputs to output counted; times the best
exact kernel (ours, cuDNN, FlashAttention-2, FlashAttention-3 if importable) and times our exact one; each head's
relative error against FP64 over all rows; what heads ran as, blocks of keys that were kept, heads that ran again. With
--policy the same for calls with the plans that adaattn.Policy has after three calls, the steady state of a model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from adaptive_problems import Problem, gpt8k, normal, stored
from adaptive_stages import looking_share, stage_times
from adaptive_tables import plot, show, show_summary, summary
from forward import Run, contestants, measure

sys.path.append(str(Path(__file__).resolve().parents[1] / "budget"))
from adaattn import Policy
from adaattn.metrics import HeadReports
from binding import Forward

import reference

TILED = 1  # adaattn_form
NORMAL_TOKENS = [512, 1024, 2048, 4096, 8192, 16384]
PROFILED_TOKENS = 8192  # of N(0, 1) heads
CALLS_LEARNED_FROM = 3


def truth(problem: Problem, most_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices into B Hq of up to so many heads, evenly spaced, and their FP64 outputs [heads, N, D]."""
    q, k, v = problem.q, problem.k, problem.v
    count, group = q.shape[0] * q.shape[1], q.shape[1] // k.shape[1]
    at = torch.linspace(0, count - 1, min(count, most_heads), device="cuda").round().long()
    b, h = at // q.shape[1], at % q.shape[1]
    out, _ = reference.by_head(
        q[b, h][:, None], k[b, h // group][:, None], v[b, h // group][:, None], causal=problem.causal
    )
    return at, out[:, 0]


def errors(out: torch.Tensor, at: torch.Tensor, want: torch.Tensor) -> list[float]:
    """Relative Frobenius errors of those heads."""
    norms = want.norm(dim=(1, 2))
    wrong = torch.stack(
        [(out.flatten(0, 1)[i].double() - head).norm() for i, head in zip(at.tolist(), want, strict=True)]
    )
    return (wrong / norms).nan_to_num(math.inf).tolist()


def budgeted(problem: Problem, budget: float, plans: np.ndarray | None = None) -> tuple[Run, Forward]:
    """A call without reports, as it is timed, and one with them."""
    out = torch.empty_like(problem.q)
    inputs = (problem.q, problem.k, problem.v, out)
    options = {"error": budget, "causal": int(problem.causal), "plans": plans}
    timed = Forward(*inputs, **options)

    def run() -> torch.Tensor:
        timed()
        return out

    return run, Forward(*inputs, reports=True, **options)


def learned_plans(problem: Problem, budget: float) -> np.ndarray:
    """What a policy hands to the engine after a few calls."""
    policy, (batch, heads, tokens) = Policy(), problem.q.shape[:3]

    def plans() -> np.ndarray:
        return policy.next_plan("layer", heads, tokens, error=budget, on_device=True).records(batch, heads)

    for _ in range(CALLS_LEARNED_FROM):
        _, call = budgeted(problem, budget, plans())
        call()
        torch.cuda.synchronize()
        words = call.reports.view(np.int64).reshape(batch, heads, -1)
        policy.record("layer", HeadReports.from_words(words), tokens, error=budget, on_device=True)
    return plans()


def judged(problem: Problem, budget: float, run: Run, reported: Forward, known: tuple) -> dict:
    """What a budget's call did, and how wrong it is."""
    out = run().clone()
    reported()
    torch.cuda.synchronize()
    heads = reported.reports.ravel()
    tiled = heads["plan"]["form"] == TILED
    kept = [float(h["high_tiles"] / h["tiles"]) if t and h["tiles"] else 1.0 for h, t in zip(heads, tiled, strict=True)]
    wrong = errors(out, *known)
    return {
        "budget": budget,
        "chosen": reported.chosen(),
        "tiled": float(tiled.mean()),
        "kept": statistics.fmean(kept),
        "kept_by_head": kept,
        "ran_again": int((heads["escalations"] > 0).sum()),
        "heads": len(heads),
        "errors": wrong,
        "worst_in_budgets": max(wrong) / budget,
        "over_budget": sum(error > budget for error in wrong),
        "estimated_limit": heads["estimated_limit"].tolist(),
    }


def bench(problem: Problem, args: argparse.Namespace, profiled: bool) -> dict:
    """One problem with all budgets."""
    q, k, v, causal = problem.q, problem.k, problem.v, problem.causal
    is_normal = problem.data == "normal"
    runs, failed = contestants(q, k, v, causal, [])
    if is_normal and not args.all_normal_peers:
        runs = {"adaattn": runs["adaattn"]}
    known = truth(problem, 8 if is_normal else 52)
    exact_errors = {}
    for name, run in list(runs.items()):
        try:
            exact_errors[name] = max(errors(run(), *known))
        except (RuntimeError, ValueError) as reason:
            failed[name] = str(reason).splitlines()[0]
            del runs[name]
    exact, rows = list(runs), []
    parts: dict[str, dict] = {}  # of rows, by contestant
    for budget in args.budgets:
        name = f"{budget:g}"
        runs[name], reported = budgeted(problem, budget)
        parts[name] = judged(problem, budget, runs[name], reported, known)
        rows.append(parts[name])
        if args.policy:
            runs[name + " policy"], reported = budgeted(problem, budget, learned_plans(problem, budget))
            parts[name]["policy"] = judged(problem, budget, runs[name + " policy"], reported, known)
            parts[name + " policy"] = parts[name]["policy"]
    # A few percent are looked for where a look does not pay: more and shorter rounds, closer to each other.
    times = (
        measure(runs, args.normal_rounds, args.normal_burst_ms)
        if is_normal
        else measure(runs, args.rounds, args.burst_ms)
    )
    best = min(exact, key=times.__getitem__)
    for name, part in parts.items():
        part |= {"ms": times[name], "over_best_exact": times[best] / times[name]}
        part["over_ours"] = times["adaattn"] / times[name]
    if profiled:
        row = rows[len(rows) // 2]
        row["stages"] = stage_times(runs[f"{row['budget']:g}"])
        row["looking_share"] = looking_share(row["stages"], times["adaattn"])
    return {
        "data": problem.data,
        "name": problem.name,
        "shape": [*q.shape, k.shape[1]],
        "causal": causal,
        "exact_ms": {name: times[name] for name in exact},
        "exact_errors": exact_errors,
        "best_exact": best,
        "budgets": rows,
        "failed": failed,
    }


def problems(args: argparse.Namespace) -> Iterator[Callable[[], Iterator[Problem]]]:
    """What the arguments name, in order."""
    dtype = getattr(torch, args.dtype)
    if args.gpt8k:
        yield lambda: gpt8k(args.gpt8k, args.sequences, dtype)
    for file in args.heads:
        yield lambda file=file: stored(file, args.repeat, dtype)
    if not args.no_normal:
        yield lambda: normal(args.dims, args.tokens, dtype)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt8k", type=Path, metavar="DIR", help="folder of the gpt8k model, with model.py")
    parser.add_argument("--sequences", type=int, default=13, help="of gpt8k, the batch (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="*", help="only these of gpt8k or of each file, from 0")
    parser.add_argument("--heads", type=Path, nargs="*", default=[], metavar="FILE", help="stored q, k and v")
    parser.add_argument("--repeat", type=int, default=8, help="stored heads along the batch (%(default)s)")
    parser.add_argument("--no-normal", action="store_true", help="without N(0, 1) heads")
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128], help="of N(0, 1) heads")
    parser.add_argument("--tokens", type=int, nargs="*", default=NORMAL_TOKENS, help="of N(0, 1) heads")
    parser.add_argument("--budgets", type=float, nargs="*", default=[1e-1, 3e-2, 1e-2])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--burst-ms", type=float, default=30.0, help="that each contestant runs in a round (%(default)s)"
    )
    parser.add_argument("--normal-rounds", type=int, default=12, help="of N(0, 1) heads (%(default)s)")
    parser.add_argument("--normal-burst-ms", type=float, default=8.0, help="of N(0, 1) heads (%(default)s)")
    parser.add_argument("--policy", action="store_true", help="calls with a policy's plans, too")
    parser.add_argument("--all-normal-peers", action="store_true", help="other libraries on N(0, 1) heads, too")
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=4,
        metavar="LAYER",
        help="microseconds by stage at the budget in the middle, of this layer (%(const)s) and N(0, 1) heads of 8,192",
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "budgets": args.budgets,
        "rows": [],
    }
    start = time.perf_counter()
    for source in problems(args):
        for at, problem in enumerate(source()):
            if problem.data != "normal" and args.layers and at not in args.layers:
                continue
            at_profile = problem.q.shape[2] == PROFILED_TOKENS if problem.data == "normal" else at == args.profile
            row = bench(problem, args, args.profile is not None and at_profile)
            report["rows"].append(row)
            print(f"[{time.perf_counter() - start:.0f} s] ", end="")
            show(row)
            report["summary"] = summary(report["rows"], args.budgets)
            if args.json:  # after each, so that what was measured is not lost
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    if report["rows"]:
        show_summary(report["summary"])
        if args.plot:
            plot(report, args.plot)


if __name__ == "__main__":
    main()
