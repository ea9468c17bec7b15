"""adaattn verify: every kernel against the FP64 reference."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from adaattn import describe
from adaattn.cli._cases import CASES, make_arrays
from adaattn.cli._check import Outcome, check
from adaattn.cli._table import table

_DESCRIPTION = """\
Runs every kernel of the table, forward and backward, on a list of small problems (head sizes, dtypes, masks, causal
alignments, windows, key lengths, grouped heads, memory layouts) and compares the results with attention in FP64.

The measure is the relative Frobenius error of each head, for the log-sum-exp the absolute error. Each tolerance is
derived from the roundings that a right kernel makes (adaattn/_tolerance.py has the reasons); the table shows the worst
error as a fraction of its tolerance, so everything up to 1 passes. Kernels that use an error budget are held to it. A
kernel may decline a problem; then the next one of
the table would take it. Takes seconds.

Exit code: 0 if all passed, 1 if a kernel was wrong."""


@dataclass(frozen=True)
class Result:
    kernel: str
    operation: str
    device: str
    case: str
    outcome: Outcome


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "verify",
        help="check every kernel against the FP64 reference, in seconds",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel (adaattn info lists them)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default 0)")
    parser.add_argument(
        "--verbose", action="store_true", help="one row per case, with the reason where one was not run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table. 1 if a kernel was wrong, else 0."""
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, must be >= 0")
    start = time.perf_counter()
    results = list(_results(args.kernel, args.seed))
    failed = [result for result in results if result.outcome.passed is False]
    compared = [result for result in results if result.outcome.passed is not None]
    if args.json:
        print(json.dumps(_summary(results, len(compared), len(failed)), indent=2))
    else:
        print(_verbose_table(results) if args.verbose else _table(results))
        seconds = time.perf_counter() - start
        print(f"\n{len(compared) - len(failed)} passed, {len(failed)} failed, in {seconds:.1f} s")
    return 1 if failed or not compared else 0


def _results(only: str | None, seed: int) -> Iterator[Result]:
    kernels = [kernel for kernel in describe()["kernels"] if only in (None, kernel["name"])]
    if not kernels:
        raise ValueError(f"--kernel is {only!r}, but `adaattn info` lists no such kernel")
    for number, case in enumerate(CASES):
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {len(CASES)}: {case.name:<50}", end="", file=sys.stderr)
        arrays = make_arrays(case, seed + number)
        for kernel in kernels:
            outcome = check(case, arrays, kernel)
            yield Result(kernel["name"], kernel["operation"], kernel["device"], case.name, outcome)
    if sys.stderr.isatty():
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr)


def _groups(results: list[Result]) -> dict[tuple[str, str, str], list[Result]]:
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.kernel, result.operation, result.device), []).append(result)
    return groups


def _table(results: list[Result]) -> str:
    rows = []
    for key, group in _groups(results).items():
        compared = [result for result in group if result.outcome.ratio is not None]
        if not compared:
            rows.append((*key, "unavailable", "0", "0", str(len(group)), "", group[0].outcome.reason))
            continue
        worst = max(compared, key=lambda result: result.outcome.ratio or 0.0)
        wrong = sum(result.outcome.passed is False for result in compared)
        state = "FAILED" if wrong else "ok"
        counts = str(len(compared) - wrong), str(wrong), str(len(group) - len(compared))
        rows.append((*key, state, *counts, f"{worst.outcome.ratio:.3g}", worst.case))
    header = ("kernel", "operation", "device", "state", "passed", "failed", "not run", "error/tolerance", "worst case")
    return table(header, rows)


def _verbose_table(results: list[Result]) -> str:
    words = {True: "ok", False: "FAILED", None: "not run"}
    rows = [
        (
            result.kernel,
            result.operation,
            result.case,
            words[result.outcome.passed],
            result.outcome.reason if result.outcome.ratio is None else f"{result.outcome.ratio:.3g}",
        )
        for result in results
    ]
    return table(("kernel", "operation", "case", "state", "error/tolerance, or why not"), rows)


def _summary(results: list[Result], compared: int, failed: int) -> dict[str, Any]:
    every = [{**asdict(result), **asdict(result.outcome), "passed": result.outcome.passed} for result in results]
    for entry in every:
        del entry["outcome"]
        if entry["ratio"] == math.inf:  # JSON has no infinity; passed says the rest
            entry["ratio"] = None
    return {"passed": compared - failed, "failed": failed, "results": every}
