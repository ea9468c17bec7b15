"""The heads that budgets are tried on: (data set, name, q, k, v, causal) of real models and of seeded generators.

Synthetic heads are float32 (1, 4, 4096, D) here; tests on GPUs make other sizes of them. `usual` ones have the shapes
that models' heads are known for; `hostile` ones are built to mislead whoever judges a head by some of its rows.
"""

from __future__ import annotations

import math
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
TOKENS, HEADS = 4096, 4


@dataclass(frozen=True)
class Case:
    """One call of attention."""

    data: str  # the data set that tables sum over
    name: str
    load: Callable[[], Heads]  # q (1, Hq, N, D), k and v (1, Hk, N, D)
    causal: bool


class Source:
    """Seeded tensors of one generator."""

    def __init__(self, name: str, dim: int, tokens: int = TOKENS, heads: int = HEADS, device: str = "cpu"):
        self.generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        self.dim, self.tokens, self.heads, self.device = dim, tokens, heads, device

    def normal(self, *shape: int) -> torch.Tensor:
        shape = shape or (1, self.heads, self.tokens, self.dim)
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def triple(self) -> Heads:
        return self.normal(), self.normal(), self.normal()

    def places(self, count: int, low: int, high: int) -> torch.Tensor:
        """Distinct integers."""
        return low + torch.randperm(high - low, generator=self.generator, device=self.device)[:count]

    def direction(self) -> torch.Tensor:
        """One unit vector per head."""
        return torch.nn.functional.normalize(self.normal(1, self.heads, 1, self.dim), dim=-1)

    def local(self, strength: float = 1.5) -> Heads:
        """Scores that are large near the diagonal alone, as a rotary embedding makes them."""
        speed = 0.002 * torch.arange(1, self.dim // 2 + 1, device=self.device)
        angle = torch.arange(self.tokens, device=self.device)[:, None] * speed
        turning = strength * torch.stack([angle.cos(), angle.sin()], -1).reshape(self.tokens, self.dim)
        return turning + 0.3 * self.normal(), turning + 0.3 * self.normal(), self.normal()


def outlier_channels(s: Source) -> Heads:
    q, k, v = s.triple()
    k[..., s.places(3, 0, s.dim)] *= 10
    v[..., s.places(1, 0, s.dim)] *= 20
    return q, k, v


def key_bias(s: Source) -> Heads:
    q, k, v = s.local()
    return q, k + 8 * s.normal(1, s.heads, 1, s.dim), v  # the softmax does not see it; 8-bit keys do


def peaked(s: Source) -> Heads:
    q, k, v = s.triple()
    return 2.5 * q, k, v


def sinks(s: Source) -> Heads:
    q, k, v = s.local()
    u = s.direction()
    k[:, :, :4] += 8 * u
    v[:, :, :4] *= 0.05
    return q + 8 * u, k, v


def spikes(s: Source) -> Heads:
    """Half the rows find one far key each."""
    q, k, v = s.local()
    rows = s.places(s.tokens // 2, 64, s.tokens)
    k[:, :, torch.div(rows, 2, rounding_mode="floor")] += 2 * q[:, :, rows]
    return q, k, v


def constant(s: Source) -> Heads:
    """By head: one query for all rows, one key for all, one value for all, and values of 0."""
    q, k, v = s.local()
    q[:, 0], k[:, 1], v[:, 2], v[:, 3] = q[:, 0, :1], k[:, 1, :1], v[:, 2, :1], 0
    return q, k, v


def huge_logits(s: Source) -> Heads:
    q, k, v = s.triple()
    return 100 * q, k, v


def video(s: Source) -> Heads:
    """Tokens of a grid, 16 x 16 x 16 for 4,096 of them, with smooth features and values (random Fourier features)."""
    sides = (torch.arange(float(side), device=s.device) for side in (s.tokens // 256, 16, 16))
    grid = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).reshape(s.tokens, 3)

    def smooth(width: float) -> torch.Tensor:
        phase = grid @ s.normal(1, s.heads, 3, s.dim) / width + 6.3 * s.normal(1, s.heads, 1, s.dim)
        return math.sqrt(2) * phase.cos()

    field = smooth(5)
    return 1.3 * field + 0.1 * s.normal(), 1.3 * field + 0.1 * s.normal(), smooth(4) + 0.1 * s.normal()


def normal(s: Source) -> Heads:
    return s.triple()


def local(s: Source) -> Heads:
    return s.local()


def scores_with_values(s: Source) -> Heads:
    """Inside every tile, keys that score high have other values than those that score low."""
    q, k, v = s.local()
    u, w = s.direction(), s.direction()
    sign = s.normal(1, s.heads, s.tokens, 1).sign()
    return q + 3 * u, k + 3 * sign * u, 0.5 * v + 3 * sign * w


def hidden_needles(s: Source) -> Heads:
    """Eight rows each find a key in a direction that hardly another row has, and its value outweighs all others."""
    q, k, v = s.local()
    rows = s.places(8, s.tokens // 2, s.tokens) | 1
    keys = s.places(8, 64, s.tokens // 2 - 64)
    u = s.direction()
    q[:, :, rows] += 12 * u
    k[:, :, keys] += 12 * u
    v[:, :, keys] *= 100
    return q, k, v


def outlier_tokens(s: Source) -> Heads:
    """In every tile one key that hardly a row looks at has a value far above the others', and one is long itself."""
    q, k, v = s.local()
    u = s.direction()
    k[:, :, 7::64] -= 6 * u
    v[:, :, 7::64] *= 100
    k[:, :, 31::64] *= 4
    return q + 6 * u, k, v


def cancelling_values(s: Source) -> Heads:
    """Neighbouring values cancel: outputs are far smaller than what they are sums of."""
    q, k, v = s.local()
    v[:, :, 1::2] = 0.05 * v[:, :, 1::2] - v[:, :, ::2]
    k[:, :, 1::2] = 0.05 * k[:, :, 1::2] + k[:, :, ::2]
    return q, k, v


def burst(s: Source) -> Heads:
    """24 neighbouring rows look everywhere, at values far larger than what the other rows see."""
    q, k, v = s.local(2)
    u = s.direction()
    first = s.tokens - 700 + 4
    q[:, :, first : first + 24] = 9 * u + s.normal(1, s.heads, 24, s.dim)
    k[:, :, 64 : s.tokens - 1500 : 7] += 2 * u
    v[:, :, 64 : s.tokens - 1500 : 7] *= 30
    return q, k, v


def value_norms(s: Source) -> Heads:
    """Norms of v over four decades, by stretches of 64 tokens."""
    q, k, v = s.local()
    decades = 4 * torch.rand(1, s.heads, s.tokens // 64, 1, generator=s.generator, device=s.device) - 2
    return q, k, v * (10**decades).repeat_interleave(64, 2)


def fading_values(s: Source) -> Heads:
    """Norms of v fall by 1e4 along the sequence: the first rows are the whole norm of the output."""
    q, k, v = s.local()
    return q, k, v * 10 ** torch.linspace(0, -4, s.tokens, device=s.device)[:, None]


def late_change(s: Source) -> Heads:
    """Local for most of the sequence, then 250 rows that look everywhere."""
    q, k, v = s.local()
    q[:, :, -300:-50] *= 0.1
    return q, k, v + 0.5 * s.direction()


def periodic(s: Source) -> Heads:
    """One row of 16 looks near, the others far: evenly spaced rows may see one kind alone."""
    q, k, v = s.local()
    far = torch.arange(s.tokens, device=s.device) % 16 != 0
    q[:, :, far] = 0.2 * q[:, :, far]
    return q, k, v


USUAL = [normal, outlier_channels, key_bias, peaked, sinks, spikes, constant, huge_logits, video, local]
HOSTILE = [
    scores_with_values, hidden_needles, outlier_tokens, cancelling_values, burst, value_norms, fading_values,
    late_change, periodic,
]  # fmt: skip


def synthetic(kinds: list[Callable[[Source], Heads]], prefix: str = "") -> Iterator[Case]:
    for kind in kinds:
        for dim in (64, 128):
            for causal in (True, False):
                name = f"{kind.__name__}/{dim}/{'causal' if causal else 'full'}"
                yield Case(prefix + kind.__name__, name, lambda k=kind, n=name, d=dim: k(Source(n, d)), causal)


def add_arguments(parser: ArgumentParser) -> None:
    """--gpt8k, --cache and which cases."""
    group = parser.add_argument_group("cases")
    group.add_argument("--gpt8k", type=Path, metavar="DIR", help="folder of the gpt8k model; without it, no such heads")
    group.add_argument("--cache", type=Path, metavar="DIR", required=True, help="folder for heads and true outputs")
    group.add_argument("--text", type=Path, metavar="FILE", help="text for the other models (a novel in the package)")
    group.add_argument("--texts", type=int, default=2, help="texts to take heads of models from (%(default)s)")
    group.add_argument("--data", nargs="+", metavar="NAME", help="only data sets whose name starts so")
    group.add_argument("--only", metavar="PART", help="only cases with this in their name")


def chosen(options: Namespace) -> list[Case]:
    """The cases that the arguments name. Heads of models that are not installed are left out with a word."""
    import real_heads

    def wanted(name: str) -> bool:
        return not options.data or any(name.startswith(start) for start in options.data)

    cases = list(real_heads.cases(options.gpt8k, options.text, options.cache, options.texts, wanted))
    cases += [case for case in [*synthetic(USUAL), *synthetic(HOSTILE, "hostile/")] if wanted(case.data)]
    cases = [case for case in cases if not options.only or options.only in case.name]
    if not cases:
        raise SystemExit("no case is left: see --data, --only and --gpt8k")
    return cases
