"""adaattn bench: attention on this machine's CPU against PyTorch's, in turns, as ratios."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaattn.benchmark import Result

_BEGIN, _END = "<!-- bench:cpu:begin -->", "<!-- bench:cpu:end -->"


def add_parser(subparsers: Any) -> None:
    """Adds the command to the `adaattn` program."""
    parser = subparsers.add_parser(
        "bench",
        help="time attention on the CPU against PyTorch's",
        description="Times exact attention on the CPU against torch's scaled_dot_product_attention: the same tensors, "
        "the same threads, one call of each in turns. Prints PyTorch's time over AdaAttn's (above 1: AdaAttn is "
        "faster), the median over all rounds. Absolute times are not shown: on a shared machine they mean little.",
    )
    parser.add_argument("--groups", nargs="+", choices=["forward", "backward", "short", "decode"], help="only these")
    parser.add_argument("--most-tokens", type=int, default=8192, help="leave out longer sequences (default 8192)")
    parser.add_argument("--seconds", type=float, default=1.5, help="about how long each case is timed (default 1.5)")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides (default: PyTorch's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the ratios (needs matplotlib)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"write the table into FILE after {_BEGIN}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the cases asked for; returns the exit status."""
    import torch

    from adaattn import benchmark, describe

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads is {arguments.threads}, must be >= 1")
        torch.set_num_threads(arguments.threads)
    cases = [
        case
        for case in benchmark.standard_cases()
        if case.keys <= arguments.most_tokens and (not arguments.groups or case.group in arguments.groups)
    ]
    if not cases:
        raise ValueError("no case is left: --groups and --most-tokens exclude all of them")
    results = []
    for index, case in enumerate(cases):
        result = benchmark.measure(case, seconds=arguments.seconds)
        results.append(result)
        text = f"[{index + 1}/{len(cases)}] {case.name}: {result.speedup:.2f} ({result.low:.2f} to {result.high:.2f})"
        print(text, file=sys.stderr, flush=True)
    means = benchmark.geometric_means(results)
    instruction_set = describe()["instruction_sets"][0]
    setting = f"{instruction_set}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = f"{setting}, PyTorch's time over AdaAttn's:\n\n{benchmark.markdown_table(results)}"
    if arguments.json:
        print(json.dumps({"setting": setting, "means": means, "results": [r.to_dict() for r in results]}, indent=2))
    else:
        print(table)
    if arguments.readme is not None:
        write_between_markers(arguments.readme, table)
    if arguments.plot is not None:
        _plot(results, arguments.plot)
    return 0


def write_between_markers(path: Path, text: str) -> None:
    """Replaces what stands between the markers of a Markdown file.

    Raises:
        ValueError: the file lacks the markers.
    """
    content = path.read_text()
    pattern = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{path} has no {_BEGIN} ... {_END}")
    path.write_text(pattern.sub(lambda _: f"{_BEGIN}\n{text}\n{_END}", content))


def _plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [p for p in ("forward", "backward") if any(r.case.group == p for r in results)]
    if not panels:
        raise ValueError("--plot draws the groups forward and backward, neither was run")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), sharey=True, squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        for dim in sorted({r.case.dim for r in results}):
            for causal in (False, True):
                line = [r for r in results if (r.case.group, r.case.dim, r.case.causal) == (panel, dim, causal)]
                label = f"D {dim}{', causal' * causal}"
                axis.plot([r.case.keys for r in line], [r.speedup for r in line], marker="o", label=label)
        axis.axhline(1, color="gray", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_title(panel)
        axis.set_xlabel("tokens")
    axes[0][0].set_ylabel("PyTorch's time / AdaAttn's")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
