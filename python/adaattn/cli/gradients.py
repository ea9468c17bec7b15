"""adaattn gradients: how far gradients within an error budget are from the truth, and from the exact step."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaattn import __version__
from adaattn.cli._table import table
from adaattn.models import MODEL_NAME, load_directory, load_smollm2

if TYPE_CHECKING:
    from adaattn.gradients import GradientErrors

_DESCRIPTION = f"""\
Runs attention within an error budget and its backward pass, and compares the gradients with those of exact attention in
FP64, head by head: the relative Frobenius error of each gradient, its cosine with the truth and the ratio of their
norms. The stability of a head is the smallest cosine of its gradients. The gradient of the output is standard normal.

The heads are random (normal, and local ones whose scores fall with the distance) unless --heads names a file with q, k
and v, or --model the folder of a transformers model ({MODEL_NAME} without a folder), which reads the text that comes
along. Runs on the CPU, in float32."""


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "gradients",
        help="errors of gradients within a budget, and how stable the step is",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", nargs="?", const="", metavar="DIR", help="heads of a transformers model")
    source.add_argument("--heads", type=Path, metavar="FILE", help="stored heads, as adaattn inspect reads them")
    parser.add_argument("--bidirectional", action="store_true", help="the heads (random or stored) are not causal")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="the first N tokens (default 1024)")
    parser.add_argument("--layers", type=int, metavar="N", help="the first N layers only")
    parser.add_argument("--error", type=float, default=0.01, metavar="E", help="error budget per head (default 0.01)")
    parser.add_argument(
        "--guarantee", choices=("measured", "bounded"), default="measured", help="what the budget promises"
    )
    parser.add_argument(
        "--backward", choices=("consistent", "exact"), default="consistent", help="exact: what float32 alone does"
    )
    parser.add_argument(
        "--truth", choices=("fp64", "exact"), default="fp64", help="exact: the exact float32 kernel, fast"
    )
    parser.add_argument(
        "--kernel", metavar="NAME", help="the only kernel to consider (default: the CPU's for the guarantee, "
        "which then takes short sequences, too)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random heads and of the output's gradient")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table. Always 0; raises ValueError, OSError or ImportError for what cannot run."""
    for name in ("tokens", "layers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}, must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, must be >= 0")
    import torch

    from adaattn.gradients import compare_gradients

    names, reports = [], []
    for index, (name, (q, k, v), causal, scale) in enumerate(_calls(args)):
        if args.layers is not None and index == args.layers:
            break
        print(f"{name} ...", file=sys.stderr, flush=True)
        dout = torch.randn(
            (*q.shape[:3], v.shape[3]), generator=torch.Generator().manual_seed(args.seed + index)
        )  # fmt: skip
        reports.append(
            compare_gradients(
                q,
                k,
                v,
                dout,
                error=args.error,
                guarantee=args.guarantee,
                backward=args.backward,
                is_causal=causal,
                scale=scale,
                kernel=args.kernel or _default_kernel(args),
                truth=args.truth,
            )
        )
        names.append(name)
    facts = {name: getattr(args, name) for name in ("error", "guarantee", "backward", "truth", "tokens", "seed")}
    if args.json:
        layers = [{"name": name, **report.to_dict()} for name, report in zip(names, reports, strict=True)]
        print(json.dumps({**facts, "version": __version__, "layers": layers}, indent=2))
    else:
        print(_report(args, names, reports))
    return 0


def _default_kernel(args: argparse.Namespace) -> str | None:
    """The kernel that uses the budget; it leaves short sequences to others unless it is named."""
    if args.error == 0:
        return None
    return {"measured": "cpu_adaptive", "bounded": "cpu_bounded"}[args.guarantee]


def _calls(args: argparse.Namespace) -> Iterator[tuple[str, Any, bool, float | None]]:
    """(name, (q, k, v), causal, scale) of each attention call."""
    if args.heads is not None:
        import torch

        from adaattn.inspection import load_heads

        for index, layer in enumerate(load_heads(args.heads)):
            heads = tuple(torch.from_numpy(array[:, :, : args.tokens].copy()) for array in layer)
            yield f"layer {index}", heads, not args.bidirectional, None
    elif args.model is not None:
        yield from _model_calls(args)
    else:
        from adaattn.gradients import random_heads

        for kind in ("normal", "local"):
            yield kind, random_heads(kind, 4, args.tokens, 64, args.seed), not args.bidirectional, None


def _model_calls(args: argparse.Namespace) -> Iterator[tuple[str, Any, bool, float | None]]:
    from importlib.resources import files

    from adaattn.gradients import model_heads

    print(f"loading {args.model or MODEL_NAME} ...", file=sys.stderr)
    model, tokenizer = load_directory(Path(args.model)) if args.model else load_smollm2()
    text = files("adaattn").joinpath("data/news_from_nowhere.txt").read_text(encoding="utf-8")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and args.tokens > most:
        raise ValueError(f"--tokens is {args.tokens}, the model takes at most {most}")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, : args.tokens]
    for index, (heads, causal, scale) in enumerate(model_heads(model, ids)):
        yield f"layer {index}", heads, causal, scale


def _report(args: argparse.Namespace, names: list[str], reports: list[GradientErrors]) -> str:
    header = ("", "head", "form", "work", "out", *(f"d{x} {what}" for x in "qkv" for what in ("error", "cos", "norm")),
              "stability")  # fmt: skip
    rows = [_row(name, r, h) for name, r in zip(names, reports, strict=True) for h in range(r.forms.size)]
    blocks = [
        f"error budget {args.error:g}, {args.guarantee}, {args.backward} gradients; truth {args.truth}",
        table(header, rows),
    ]
    if rows:
        stability = np.concatenate([report.stability for report in reports])
        worst = {
            name: max(float(getattr(r, name).error.max(initial=0)) for r in reports) for name in ("out", "q", "k", "v")
        }
        blocks.append(
            "largest error: out {out:.2e}, dq {q:.2e}, dk {k:.2e}, dv {v:.2e}; ".format(**worst)
            + f"stability: median {np.median(stability):.6f}, least {stability.min():.6f}"
        )
    return "\n\n".join(blocks)


def _row(name: str, report: GradientErrors, head: int) -> tuple[str, ...]:
    key_head = head * report.k.error.size // report.forms.size
    cells = []
    for part, at in ((report.q, head), (report.k, key_head), (report.v, key_head)):
        cells += [f"{part.error[at]:.2e}", f"{part.cosine[at]:.5f}", f"{part.norm_ratio[at]:.4f}"]
    form = str(report.forms[head]).replace("_", " ")
    start = (name, str(head), form, f"{report.work[head]:.2f}", f"{report.out.error[head]:.2e}")
    return (*start, *cells, f"{report.stability[head]:.5f}")
