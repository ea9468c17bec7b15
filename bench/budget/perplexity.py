"""What budgets do to perplexity: every token's loss with exact attention and within each budget, in pairs.

Each sequence runs once exactly and once per budget; one JSON line for each goes to --records, and what is there
already is not run again. --shard 2/4 takes every fourth sequence, from the third on, so that parts can run on several
machines or at several times; --merge sums parts up. The change of perplexity is exp(mean difference of losses) - 1;
its standard error comes from the means of the sequences. Bars: gpt8k 0.15 / 0.05 / 0.02 % at 1e-1 / 3e-2 / 1e-2,
smollm2 0.1 % at 1e-2, on at least 100,000 tokens. Exits with 1 if one is missed.

    python perplexity.py gpt8k --gpt8k DIR --cache DIR --records part0.jsonl --shard 0/2
    python perplexity.py smollm2 --text wikitext2-valid.txt --cache DIR --records smollm2.jsonl
    python perplexity.py --merge part0.jsonl part1.jsonl smollm2.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import adaattn
import records
import torch
from language_models import MODELS, LanguageModel
from records import Record, by, table

BARS = {("gpt8k", 1e-1): 0.15, ("gpt8k", 3e-2): 0.05, ("gpt8k", 1e-2): 0.02, ("smollm2", 1e-2): 0.1}  # per cent
LEAST_TOKENS = 100_000


class Attend:
    """Causal attention within a budget that keeps the calls' reports."""

    def __init__(self, error: float):
        self.error = error
        self.heads: list[Record] = []

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        inputs = [x.cpu() for x in (q, k, v)]  # the engine's, wherever the rest of the model runs
        shared = {"is_causal": True, "enable_gqa": q.shape[1] != k.shape[1]}
        out: torch.Tensor
        if self.error == 0:
            out = adaattn.attention(*inputs, **shared)
        else:
            out, metrics = adaattn.attention(*inputs, error=self.error, return_metrics=True, **shared)
            self.heads += records.reports(metrics, q.shape[1])
        return out.to(q.device)


def run_sequence(model: LanguageModel, index: int, tokens: int, budget: float) -> Record:
    attend = Attend(budget)
    start = time.perf_counter()
    with torch.inference_mode():
        losses = model.losses(model.sequence(index, tokens), attend)
    record: Record = {"model": model.name, "sequence": index, "budget": budget, "tokens": len(losses)}
    record |= {"loss": losses.sum().item(), "seconds": time.perf_counter() - start}
    if attend.heads:
        record["work"] = statistics.fmean(head["work"] for head in attend.heads)
        record["escalated"] = statistics.fmean(head["escalations"] > 0 for head in attend.heads)
    return record


def run(options: argparse.Namespace) -> None:
    """The sequences of this shard that are not in the file yet."""
    part, parts = options.shard
    stamp = records.library_stamp()
    mine = range(part, options.sequences, parts)
    wanted = [(options.model, index, budget) for index in mine for budget in [0.0, *options.budgets]]
    known = {(r["model"], r["sequence"], r["budget"]) for r in read([options.records]) if r["library"] == stamp}
    missing = [key for key in wanted if key not in known]
    if not missing:
        return
    records.progress(f"loading {options.model}", options.quiet)
    model = MODELS[options.model](options.gpt8k, options.cache, options.text, options.device)
    for done, (_, index, budget) in enumerate(missing):
        records.progress(f"{done}/{len(missing)} sequence {index} at {budget:g}", options.quiet)
        record = run_sequence(model, index, options.tokens, budget)
        with options.records.open("a") as target:
            target.write(json.dumps({"library": stamp, **record}) + "\n")
    records.progress("", options.quiet)


def read(files: list[Path]) -> list[Record]:
    return [record for file in files for record in records.lines(file)]


def summaries(found: list[Record]) -> list[dict[str, Any]]:
    """One row per model, library and budget, over the sequences that also ran exactly with that library."""
    exact = {(r["library"], r["model"], r["sequence"], r["tokens"]): r for r in found if r["budget"] == 0}
    rows = []
    for (library, model, budget), group in by([r for r in found if r["budget"]], "library", "model", "budget").items():
        unique = {(library, model, r["sequence"], r["tokens"]): r for r in group}
        pairs = [(r, exact[key]) for key, r in unique.items() if key in exact]
        if not pairs:
            continue
        tokens = sum(r["tokens"] for r, _ in pairs)
        means = [(r["loss"] - e["loss"]) / r["tokens"] for r, e in pairs]
        spread = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        rows.append(
            {
                "model": model,
                "budget": budget,
                "sequences": len(pairs),
                "tokens": tokens,
                "exact_perplexity": math.exp(sum(e["loss"] for _, e in pairs) / tokens),
                "change_percent": 100 * math.expm1(sum(r["loss"] - e["loss"] for r, e in pairs) / tokens),
                "standard_error_percent": 100 * spread,
                "work": statistics.fmean(r.get("work", 1.0) for r, _ in pairs),
                "escalated": statistics.fmean(r.get("escalated", 0.0) for r, _ in pairs),
                "library": library,
            }
        )
    return rows


def misses(rows: list[dict[str, Any]]) -> list[str]:
    said = []
    for row in rows:
        bar = BARS.get((row["model"], row["budget"]))
        where = f"{row['model']} at {row['budget']:g}"
        if bar is not None and row["change_percent"] > bar:
            said.append(f"{where}: {row['change_percent']:+.3f} % of perplexity, may be {bar} %")
        if bar is not None and row["tokens"] < LEAST_TOKENS:
            said.append(f"{where}: {row['tokens']} tokens, must be {LEAST_TOKENS}")
    return said


def shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}, must be i/n with i from 0 to n - 1")
    return int(part), int(parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=list(MODELS))
    parser.add_argument("--gpt8k", type=Path, metavar="DIR", help="folder of the gpt8k model")
    parser.add_argument("--text", type=Path, metavar="FILE", help="the text for smollm2")
    parser.add_argument("--cache", type=Path, metavar="DIR", default=Path("."), help="where token ids are kept")
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="JSON lines that this run adds to and goes on from"
    )
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", default=[], help="records of other parts")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(records.BUDGETS), metavar="E")
    parser.add_argument("--sequences", type=int, default=13, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="per sequence (%(default)s)")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="only sequences I, I + N, ...")
    parser.add_argument("--device", default="cpu", help="of all but the attention: cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, help="(all cores)")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args()
    if options.model and not options.records:
        parser.error("a model needs --records, the file that results go to")
    if options.model == "gpt8k" and not options.gpt8k:
        parser.error("gpt8k needs --gpt8k, the folder of the model")
    if not options.model and not options.merge:
        parser.error("name a model to run or records to --merge")
    return options


def main() -> int:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.model:
        run(options)
    rows = summaries(read([*([options.records] if options.records else []), *options.merge]))
    missed = misses(rows)
    if options.json:
        print(json.dumps({"rows": rows, "missed": missed}, indent=1))
    elif rows:
        print(
            table(list(rows[0]), [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in r.values()] for r in rows])
        )
        print("\n".join(["", *missed]) if missed else "\nall bars of what ran are met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
