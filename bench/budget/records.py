"""What calls within a budget did, head by head, as JSON lines in a file, so that a run goes on where one stopped."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adaattn
import torch
from adaattn import _library
from cases import Case, Heads
from truth import head_errors, true_output

BUDGETS = (1e-1, 3e-2, 1e-2, 3e-3)
Record = dict[str, Any]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), metavar="E", help="(%(default)s)")
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="where results by head go and are taken from (CACHE/records.jsonl)"
    )
    parser.add_argument("--json", action="store_true", help="the summary as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def collect(cases: list[Case], guarantees: list[str], options: Namespace) -> list[Record]:
    """One record per head of every case, budget and guarantee: from the file where this library's are there already."""
    file = options.records or options.cache / "records.jsonl"
    stamp = library_stamp()
    known = _read(file, stamp)
    wanted = [(case, budget, kind) for case in cases for kind in guarantees for budget in options.budgets]
    result: list[Record] = []
    loaded: tuple[str, Heads, torch.Tensor] | None = None
    for done, (case, budget, kind) in enumerate(wanted):
        key = (case.name, budget, kind)
        if key not in known:
            progress(f"{done}/{len(wanted)} {case.name} at {budget:g}, {kind}", options.quiet)
            if loaded is None or loaded[0] != case.name:
                heads = case.load()
                loaded = (case.name, heads, true_output(heads, case.causal, options.cache))
            known[key] = measure(case, loaded[1], loaded[2], budget, kind)
            with file.open("a") as target:
                for record in known[key]:
                    target.write(json.dumps({"library": stamp, **record}) + "\n")
        result += known[key]
    progress("", options.quiet)
    return result


def measure(
    case: Case,
    heads: Heads,
    truth: torch.Tensor,
    budget: float,
    guarantee: str,
    attention: Callable[..., Any] = adaattn.attention,
) -> list[Record]:
    """One call, its true errors and its report."""
    asked = {"error": budget} if guarantee == "measured" else {"error": budget, "guarantee": guarantee}
    start = time.perf_counter()
    out, metrics = attention(*heads, is_causal=case.causal, enable_gqa=True, return_metrics=True, **asked)
    seconds = time.perf_counter() - start
    shared = {"data": case.data, "case": case.name, "budget": budget, "guarantee": guarantee}
    shared |= {"kernel": metrics.kernel, "fallback": metrics.fallback, "call_seconds": seconds}
    errors = head_errors(out, truth)
    return [
        {**shared, "head": head, "error": error, **report}
        for head, (error, report) in enumerate(zip(errors, reports(metrics, len(errors)), strict=True))
    ]


def reports(metrics: Any, heads: int) -> list[Record]:
    """The call's report, one dict per head; exact calls have none, so theirs is written here."""
    if metrics.heads is None:
        return [{"forms": "dense", "work": 1.0, "estimated_error": 0.0, "escalations": 0}] * heads
    columns = metrics.heads.to_dict()
    return [{name: rows[0][head] for name, rows in columns.items() if rows is not None} for head in range(heads)]


def library_stamp() -> str:
    """Of the library's file: results of another build do not count."""
    path = os.environ.get("ADAATTN_LIBRARY") or next(Path(_library.__file__).parent.rglob("libadaattn*"))
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def _read(file: Path, stamp: str) -> dict[tuple[str, float, str], list[Record]]:
    known: dict[tuple[str, float, str], list[Record]] = {}
    for record in lines(file):
        if record.pop("library") == stamp:
            known.setdefault((record["case"], record["budget"], record["guarantee"]), []).append(record)
    return known


def lines(file: Path) -> Iterator[Record]:
    if not file.exists():
        return
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # a run was stopped while it wrote
            print(f"{file}: a line that is no JSON is passed over", file=sys.stderr)


def progress(text: str, quiet: bool = False) -> None:
    """Over the last one, on terminals; else a line each."""
    if quiet or (not text and not sys.stderr.isatty()):
        return
    sys.stderr.write(f"\r\x1b[K{text}" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()


def by(records: list[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records in groups of equal values of names, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
