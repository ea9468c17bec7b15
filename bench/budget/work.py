"""What budgets save: multiply-adds as a share of dense attention's, by data set and budget.

The shares are the library's own count (screen, scores, P V, pilot and verification; 8-bit products count half), over
heads that all weigh the same. Beside them the forms that heads ran in and the classes of the tiles of tiled heads.
Bars: gpt8k at most 0.35 / 0.45 / 0.58 at 1e-1 / 3e-2 / 1e-2. Exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import cases
import records
from records import Record, by, table

BARS = {1e-1: 0.35, 3e-2: 0.45, 1e-2: 0.58}
CLASSES = ("high", "low", "summarised", "pooled", "dropped")
FORMS = ("dense", "tiled", "low_rank")


def summary(group: list[Record]) -> dict[str, Any]:
    """Of the heads of one data set at one budget."""
    tiles = sum(r.get("tiles", 0) for r in group)
    result: dict[str, Any] = {
        "heads": len(group),
        "work": statistics.fmean(r["work"] for r in group),
        "least": min(r["work"] for r in group),
        "most": max(r["work"] for r in group),
    }
    result |= {form: sum(r["forms"] == form for r in group) / len(group) for form in FORMS}
    result |= {name: sum(r.get(f"{name}_tiles", 0) for r in group) / max(tiles, 1) for name in CLASSES}
    return result


def misses(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"gpt8k at {row['budget']:g}: {row['work']:.3f} of dense work, may be {BARS[row['budget']]}"
        for row in rows
        if row["data"] == "gpt8k" and row["guarantee"] == "measured" and row["work"] > BARS.get(row["budget"], 1e9)
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    numbers = ("work", "least", "most")
    head = ["data", "budget", "heads", *numbers, *(f"{name} heads" for name in FORMS), *(f"{c} tiles" for c in CLASSES)]
    return table(
        head,
        [
            [row["data"] + (", bounded" if row["guarantee"] == "bounded" else ""), f"{row['budget']:g}"]
            + [str(row["heads"]), *(f"{row[name]:.2f}" for name in numbers)]
            + [f"{100 * row[name]:.0f} %" for name in (*FORMS, *CLASSES)]
            for row in rows
        ],
    )


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Work over budget for every data set, and the classes of tiles of the real models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = by([row for row in rows if row["guarantee"] == "measured"], "data")
    real = [data for (data,) in measured if data in ("gpt8k", "smollm2", "minilm")]
    figure, axes = pyplot.subplots(1, 1 + len(real), figsize=(5.5 + 4 * len(real), 4.5), squeeze=False)
    for (data,), group in measured.items():
        style = {"linewidth": 2.5} if data in real else {"linewidth": 1, "linestyle": ":"}
        axes[0][0].plot([r["budget"] for r in group], [r["work"] for r in group], marker="o", label=data, **style)
    axes[0][0].set(xscale="log", xlabel="budget", ylabel="multiply-adds over dense attention's", ylim=(0, None))
    axes[0][0].axhline(1, color="grey", linewidth=0.8)
    axes[0][0].legend(fontsize=6)
    for axis, data in zip(axes[0][1:], real, strict=True):
        stack_classes(axis, data, measured[(data,)])
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def stack_classes(axis: Any, data: str, group: list[dict[str, Any]]) -> None:
    labels = [f"{row['budget']:g}" for row in group]
    below = [0.0] * len(group)
    shares = {"dense heads": [row["dense"] for row in group]}
    shares |= {name: [row[name] * row["tiled"] for row in group] for name in CLASSES}
    for name, heights in shares.items():
        axis.bar(labels, heights, bottom=below, label=name)
        below = [b + h for b, h in zip(below, heights, strict=True)]
    axis.set(title=f"tiles of {data}", xlabel="budget", ylim=(0, 1.02))
    axis.legend(fontsize=6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser)
    records.add_arguments(parser)
    parser.add_argument("--guarantees", nargs="+", choices=["measured", "bounded"], default=["measured"])
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where a plot goes")
    options = parser.parse_args()
    found = records.collect(cases.chosen(options), options.guarantees, options)
    names = ("guarantee", "data", "budget")
    rows = [{**dict(zip(names, key, strict=True)), **summary(group)} for key, group in by(found, *names).items()]
    missed = misses(rows)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        print(json.dumps({"rows": rows, "missed": missed}, indent=1))
    else:
        print(markdown(rows))
        print("\n".join(["", *missed]) if missed else "\nall bars of what ran are met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
