"""What adaptive.py prints and draws of its rows."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from adaptive_stages import show_stages


def show(row: dict) -> None:
    """The lines of one problem."""
    exact = "  ".join(f"{name} {ms:.3f}" for name, ms in row["exact_ms"].items())
    print(f"{row['name']:28} exact, ms: {exact}", *row["failed"].values())
    for part in row["budgets"]:
        show_part(f"{part['budget']:g}", part)
        if part.get("stages"):
            show_stages(part)
        if "policy" in part:
            show_part("policy", part["policy"])
    sys.stdout.flush()


def show_part(label: str, part: dict) -> None:
    """The line of one budget."""
    if part["chosen"] != "sm90_adaptive":
        print(f"  {label:<6} {part['over_ours']:5.2f}x ours   by {part['chosen']}")
        return
    print(
        f"  {label:<6} {part['ms']:7.3f} ms {part['over_best_exact']:5.2f}x {part['over_ours']:6.3f}x ours"
        f"  kept {part['kept']:.2f}  tiled {part['tiled']:.2f}  again {part['ran_again']}/{part['heads']}"
        f"  worst {part['worst_in_budgets']:.2f} budgets, {part['over_budget']}/{len(part['errors'])} over"
    )


def summary(rows: list[dict], budgets: list[float]) -> list[dict]:
    """Means over the problems of each data set, those of a policy's calls by themselves."""
    table = []
    for data in dict.fromkeys(row["data"] for row in rows):
        for at, budget in enumerate(budgets):
            parts = [(row, row["budgets"][at]) for row in rows if row["data"] == data]
            table.append({"data": data, "budget": budget, "policy": False} | means(parts, budget))
            if "policy" in parts[0][1]:
                parts = [(row, part["policy"]) for row, part in parts]
                table.append({"data": data, "budget": budget, "policy": True} | means(parts, budget))
    return table


def means(parts: list[tuple[dict, dict]], budget: float) -> dict:
    """Of problems and their rows for one budget."""
    wrong = [error for _, part in parts for error in part["errors"]]
    exact = sum(row["exact_ms"][row["best_exact"]] for row, _ in parts)
    return {
        "problems": len(parts),
        "mean_over_best_exact": statistics.fmean(part["over_best_exact"] for _, part in parts),
        "total_over_best_exact": exact / sum(part["ms"] for _, part in parts),
        "least_over_ours": min(part["over_ours"] for _, part in parts),
        "kept": statistics.fmean(part["kept"] for _, part in parts),
        "tiled": statistics.fmean(part["tiled"] for _, part in parts),
        "ran_again": sum(part["ran_again"] for _, part in parts),
        "heads": sum(part["heads"] for _, part in parts),
        "over_budget": sum(error > budget for error in wrong) / len(wrong),
        "worst_in_budgets": max(wrong) / budget,
    }


def show_summary(table: list[dict]) -> None:
    """One line per data set and budget."""
    print(
        f"\n{'data':14} {'budget':>6} {'mean':>6} {'total':>6} {'least of ours':>14} {'kept':>5} {'tiled':>6}"
        f" {'again':>10} {'over':>7} {'worst':>6}   (times the best exact: mean of ratios, ratio of sums)"
    )
    for row in table:
        again = f"{row['ran_again']}/{row['heads']}"
        data = row["data"] + (" policy" if row["policy"] else "")
        print(
            f"{data:14} {row['budget']:6g}"
            f" {row['mean_over_best_exact']:6.2f} {row['total_over_best_exact']:6.2f}"
            f" {row['least_over_ours']:14.3f} {row['kept']:5.2f} {row['tiled']:6.2f} {again:>10}"
            f" {row['over_budget']:7.2%} {row['worst_in_budgets']:6.2f}"
        )


def plot(report: dict, file: Path) -> None:
    """Times the best exact kernel, by problem: one panel per data set, one line per budget."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot, matplotlib is not installed")
        return
    sets = list(dict.fromkeys(row["data"] for row in report["rows"]))
    figure, axes = plt.subplots(1, len(sets), figsize=(1 + 4.5 * len(sets), 4.5), squeeze=False)
    for axis, data in zip(axes[0], sets, strict=True):
        rows = [row for row in report["rows"] if row["data"] == data]
        labels = [row["name"].removeprefix(data).strip("/ ") for row in rows]
        for at, budget in enumerate(report["budgets"]):
            ratios = [row["budgets"][at]["over_best_exact"] for row in rows]
            axis.plot(labels, ratios, marker="o", label=f"budget {budget:g}")
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(title=data, ylim=(0, None))
        axis.tick_params(axis="x", rotation=75)
    axes[0][0].set_ylabel("times the best exact kernel")
    axes[0][0].legend()
    figure.suptitle(f"{report['device']}, {report['dtype']}")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
