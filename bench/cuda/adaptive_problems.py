"""The calls that budgets are timed on: heads of gpt8k, heads from files, and N(0, 1)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "budget"))
from real_heads import gpt8k_ids, gpt8k_module


class Problem(NamedTuple):
    """Inputs of one call, on the GPU."""

    data: str
    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool


def gpt8k(folder: Path, sequences: int, dtype: torch.dtype) -> Iterator[Problem]:
    """One problem per layer: float32 heads of the first sequences of the held-out text, rounded to dtype."""
    module = gpt8k_module(folder)
    weights = module.load(str(folder), "cuda")
    with tempfile.TemporaryDirectory() as cache:
        ids = gpt8k_ids(folder, Path(cache)).cuda()
    tokens = 8192
    layers: list[list[torch.Tensor]] = []

    def keep(layer: int, *heads: torch.Tensor) -> None:
        if layer == len(layers):
            layers.append([torch.empty(sequences, *x.shape, device="cuda", dtype=dtype) for x in heads])
        for batch, x in zip(layers[layer], heads, strict=True):
            batch[i].copy_(x)

    for i in range(sequences):
        module.run(weights, ids[i * tokens : (i + 1) * tokens], each_layer=keep)
    for layer, (q, k, v) in enumerate(layers):
        yield Problem("gpt8k", f"gpt8k layer {layer}", q, k, v, True)


def stored(file: Path, repeat: int, dtype: torch.dtype) -> Iterator[Problem]:
    """One problem per entry of a file; its name up to a slash or a space is that of the data."""
    for entry in torch.load(file):
        heads = (entry[name].to("cuda", dtype).repeat(repeat, 1, 1, 1) for name in "qkv")
        yield Problem(entry["name"].replace("/", " ").split()[0], entry["name"], *heads, True)


def normal(dims: list[int], tokens: list[int], dtype: torch.dtype) -> Iterator[Problem]:
    """B N = 32,768 and H D = 2,048, as in the papers."""
    for d in dims:
        for causal in (False, True):
            for n in tokens:
                heads = (torch.randn(32768 // n, 2048 // d, n, d, device="cuda", dtype=dtype) for _ in range(3))
                yield Problem("normal", f"normal n{n} d{d}" + (" causal" if causal else ""), *heads, causal)
