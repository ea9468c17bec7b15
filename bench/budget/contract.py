"""Do heads keep their budgets? True errors in FP64 of every case, at every budget, under both guarantees.

Bars. `bounded`: no head over its budget, and bound >= error always. `measured`: at most 1 head in 100 over its budget,
none over 1.5 of it, under 10 % of heads run again once a policy has seen a few calls (--policy). Hostile cases are
counted apart: they say where the estimate can be misled, and their heads do not count among the 1 in 100.
Exits with 1 if a bar is missed. All rows of all heads are compared (see truth.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from functools import partial
from typing import Any

import adaattn
import cases
import records
from records import Record, by, table
from truth import true_output

# Exact float32 heads have an error of about 3e-7; what their report calls 0 is that.
_FLOAT32 = 1e-5


def summary(group: list[Record]) -> dict[str, Any]:
    """Of heads of one data set, budget and guarantee."""
    ratios = [r["error"] / r["budget"] for r in group]
    tiled = [r for r in group if r["forms"] != "dense"]
    estimates = [r["estimated_error"] / r["error"] for r in tiled if r["error"] > _FLOAT32]
    bounds = [bound_of(r) for r in group]
    return {
        "heads": len(group),
        "dense": len(group) - len(tiled),
        "over": sum(ratio > 1 for ratio in ratios),
        "worst": max(ratios),
        "median": statistics.median(ratios),
        "escalated": sum(r["escalations"] > 0 for r in group),
        "estimate_low": min(estimates, default=None),
        "estimate_median": statistics.median(estimates) if estimates else None,
        "bound_broken": sum(bound + _FLOAT32 < r["error"] for bound, r in zip(bounds, group, strict=True)),
        "bound_over": sum(bound > r["budget"] for bound, r in zip(bounds, group, strict=True)),
        "work": statistics.fmean(r["work"] for r in group),
    }


def summaries(found: list[Record]) -> list[dict[str, Any]]:
    groups = by(found, "guarantee", "data", "budget")
    names = ("guarantee", "data", "budget")
    return [{**dict(zip(names, key, strict=True)), **summary(group)} for key, group in groups.items()]


def misses(rows: list[dict[str, Any]], found: list[Record]) -> list[str]:
    """The bars that are missed, in words."""
    said = []
    for record in found:
        bounded, hostile = record["guarantee"] == "bounded", record["data"].startswith("hostile/")
        limit = 1.0 if bounded else 1.5
        if not record["error"] <= limit * record["budget"] and not (hostile and not bounded):
            said.append(f"{where(record)}: error {record['error']:.2e} is {record['error'] / record['budget']:.2f} e")
        if bounded and record["error"] > bound_of(record) + _FLOAT32:
            said.append(f"{where(record)}: bound {bound_of(record):.2e} below the error {record['error']:.2e}")
        if bounded and not bound_of(record) <= record["budget"]:
            said.append(f"{where(record)}: bound {bound_of(record):.2e} over the budget")
    for budget in sorted({row["budget"] for row in rows}):
        usual = [r for r in rows if r["budget"] == budget and r["guarantee"] == "measured"]
        usual = [r for r in usual if not r["data"].startswith("hostile/")]
        over, heads = sum(r["over"] for r in usual), sum(r["heads"] for r in usual)
        if heads and over > heads / 100:
            said.append(f"measured at {budget:g}: {over} of {heads} heads over, may be 1 in 100")
    return said


def bound_of(record: Record) -> float:
    bound = record.get("error_bound")
    return math.inf if bound is None else bound


def where(record: Record) -> str:
    return f"{record['guarantee']} {record['case']} head {record['head']} at {record['budget']:g}"


def policy_run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One adaattn.Policy per model and budget over its texts, one after the other: a row for each text."""
    rows = []
    real = [(*case.name.split("/"), case) for case in cases.chosen(options) if "/layer" in case.name]
    for data, budget in itertools.product(dict.fromkeys(part[0] for part in real), options.budgets):
        policy = adaattn.Policy()
        for text in dict.fromkeys(part[1] for part in real if part[0] == data):
            found: list[Record] = []
            for _, _, layer, case in (part for part in real if part[:2] == (data, text)):
                records.progress(f"policy at {budget:g}: {case.name}", options.quiet)
                heads = case.load()
                truth = true_output(heads, case.causal, options.cache)
                found += records.measure(case, heads, truth, budget, "measured", partial(policy.attention, layer))
            rows.append({"data": data, "budget": budget, "text": text, **summary(found)})
    return rows


def policy_misses(rows: list[dict[str, Any]]) -> list[str]:
    """Of the last text of each model."""
    last = {(row["data"], row["budget"]): row for row in rows}.values()
    return [
        f"policy, {row['data']} at {row['budget']:g}: {row['escalated']} of {row['heads']} heads ran again in the last "
        "text, may be 1 in 10"
        for row in last
        if row["escalated"] > row["heads"] / 10
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser)
    records.add_arguments(parser)
    parser.add_argument("--guarantees", nargs="+", choices=["measured", "bounded"], default=["measured"])
    parser.add_argument("--policy", action="store_true", help="also a policy over consecutive calls")
    options = parser.parse_args()
    found = records.collect(cases.chosen(options), options.guarantees, options)
    rows = summaries(found)
    missed = misses(rows, found)
    policy = policy_run(options) if options.policy else []
    missed += policy_misses(policy)
    if options.json:
        print(json.dumps({"rows": rows, "policy": policy, "missed": missed}, indent=1))
    else:
        print(table(list(rows[0]), [[shown(value) for value in row.values()] for row in rows]))
        if policy:
            print(table(list(policy[0]), [[shown(value) for value in row.values()] for row in policy]))
        print("\n".join(["", *missed]) if missed else "\nall bars of what ran are met")
    return 1 if missed else 0


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
