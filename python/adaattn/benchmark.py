"""Attention on the CPU timed against PyTorch's, in turns within one run, so that only ratios count."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from adaattn.functional import attention

Pass = Literal["forward", "backward"]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One problem: q, k and v are (batch, heads, tokens, dim) of standard normal numbers."""

    group: str  # cases whose geometric mean is reported together
    direction: Pass
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    causal: bool
    key_heads: int = 0  # 0: as many as heads
    dtype: str = "float32"

    @property
    def name(self) -> str:
        tokens = str(self.keys) if self.queries == self.keys else f"{self.queries} of {self.keys}"
        return f"{self.group}: B {self.batch}, H {self.heads}, N {tokens}, D {self.dim}{', causal' * self.causal}"


@dataclass(frozen=True)
class Result:
    """Median over the rounds of PyTorch's time over AdaAttn's, and the quartiles: above 1, AdaAttn is faster."""

    case: Case
    speedup: float
    low: float
    high: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def standard_cases() -> list[Case]:
    """The grid of the README: D 64 and 128, N 512 to 8,192, causal and not, plus short sequences and decoding."""
    cases = []
    directions: tuple[Pass, ...] = ("forward", "backward")
    for direction in directions:
        for dim in (64, 128):
            for tokens in (512, 1024, 2048, 4096, 8192):
                heads = max(1, 8192 // tokens) * (128 // dim)  # about the same work per token count
                cases += [Case(direction, direction, 1, heads, tokens, tokens, dim, causal) for causal in (False, True)]
    for dim in (64, 128):
        cases += [Case("short", "forward", 64, 8, 128, 128, dim, causal) for causal in (False, True)]
    cases += [Case("decode", "forward", 1, 32, 1, keys, 128, False, key_heads=8) for keys in (1024, 8192)]
    return cases


def _calls(case: Case) -> tuple[Call, Call]:
    """(PyTorch, AdaAttn) on the same tensors."""
    generator = torch.Generator().manual_seed(1)
    key_heads = case.key_heads or case.heads
    gqa = key_heads != case.heads

    def tensor(heads: int, tokens: int) -> torch.Tensor:
        data = torch.randn(case.batch, heads, tokens, case.dim, generator=generator)
        return data.to(getattr(torch, case.dtype)).requires_grad_(case.direction == "backward")

    q, k, v = tensor(case.heads, case.queries), tensor(key_heads, case.keys), tensor(key_heads, case.keys)

    def peer() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=gqa)

    def ours() -> torch.Tensor:
        out: torch.Tensor = attention(q, k, v, is_causal=case.causal, enable_gqa=gqa)
        return out

    if case.direction == "forward":
        return peer, ours
    dout = torch.randn(q.shape, generator=generator).to(q.dtype)
    outputs = peer(), ours()

    def backward(out: torch.Tensor) -> Call:
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    return backward(outputs[0]), backward(outputs[1])


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(case: Case, *, seconds: float = 1.5, least_rounds: int = 5) -> Result:
    """Times both sides in rounds of one call each, taking turns at going first.

    Args:
        case: The problem.
        seconds: About how long all rounds take together.
        least_rounds: Rounds even if they take longer.
    """
    peer, ours = _calls(case)
    once = min(_seconds(peer) + _seconds(ours) for _ in range(2))
    rounds = max(least_rounds, min(200, int(seconds / once)))
    ratios = []
    for index in range(rounds):
        if index % 2 == 0:
            theirs = _seconds(peer)
            ratios.append(theirs / _seconds(ours))
        else:
            mine = _seconds(ours)
            ratios.append(_seconds(peer) / mine)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Result(case, middle, low, high, rounds)


def geometric_means(results: Iterable[Result]) -> dict[str, float]:
    """Geometric mean of the speedups by group."""
    groups: dict[str, list[float]] = {}
    for result in results:
        groups.setdefault(result.case.group, []).append(math.log(result.speedup))
    return {group: math.exp(statistics.fmean(logs)) for group, logs in groups.items()}


def markdown_table(results: Sequence[Result]) -> str:
    """The results as the README shows them: a row per group and head size, a column per number of keys."""
    lengths = sorted({result.case.keys for result in results})
    rows: dict[str, dict[int, float]] = {}
    for result in results:
        case = result.case
        label = f"{case.group}, D {case.dim}{', causal' * case.causal}"
        rows.setdefault(label, {})[case.keys] = result.speedup
    lines = ["| | " + " | ".join(f"N {length:,}" for length in lengths) + " |", "|---|" + "---:|" * len(lengths)]
    for label, cells in rows.items():
        shown = (f"{cells[length]:.2f}" if length in cells else "" for length in lengths)
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    means = ", ".join(f"{group} {mean:.2f}" for group, mean in geometric_means(results).items())
    return "\n".join([*lines, "", f"Geometric means: {means}. Smallest: {min(r.speedup for r in results):.2f}."])
