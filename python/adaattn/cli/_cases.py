"""The problems that `adaattn verify` runs: small, and each with something that a kernel can get wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Case:
    name: str
    q: tuple[int, int, int, int] = (2, 2, 64, 64)  # B, Hq, Nq, D
    keys: tuple[int, int] = (2, 64)  # Hk, Nk
    dv: int | None = None  # None: D
    dtype: str = "float32"
    mask: str | None = None  # "bool" or "additive"
    tokens_first: bool = False  # memory is (B, N, H, D)
    local: bool = False  # scores are large near the diagonal alone, which leaves something to a budget
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def score_size(self) -> float:
        """Standard deviation of the scaled scores: inputs are standard normal, so that of a dot product is sqrt(D)."""
        deviation = math.sqrt(self.q[3])
        return float(self.options.get("scale", 1 / deviation)) * deviation

    @property
    def rows(self) -> int:
        """The longest sum in the backward pass."""
        return max(self.q[2] * self.q[1] // self.keys[0], self.keys[1])


CASES = (
    Case("plain"),
    Case("plain float16", dtype="float16"),
    Case("plain bfloat16", dtype="bfloat16"),
    Case("ragged sizes", q=(1, 3, 37, 80), keys=(3, 53), dv=48),
    Case("D = 1", q=(1, 2, 20, 1), keys=(2, 30)),
    Case("D = 256", q=(1, 1, 33, 256), keys=(1, 70)),
    Case("heads inside tokens", q=(2, 4, 40, 64), keys=(4, 40), tokens_first=True),
    Case("causal", q=(1, 2, 130, 64), keys=(2, 130), options={"is_causal": True}),
    Case("causal bfloat16", q=(1, 2, 130, 64), keys=(2, 130), dtype="bfloat16", options={"is_causal": True}),
    Case("causal, more queries", q=(1, 2, 90, 32), keys=(2, 50), options={"is_causal": True}),
    Case(
        "causal bottom right",
        q=(1, 2, 50, 32),
        keys=(2, 90),
        options={"is_causal": True, "alignment": "bottom_right"},
    ),
    Case(
        "causal bottom right, rows without keys",
        q=(1, 2, 40, 32),
        keys=(2, 25),
        options={"is_causal": True, "alignment": "bottom_right"},
    ),
    Case("grouped heads", q=(2, 8, 48, 64), keys=(2, 48)),
    Case("grouped heads float16", q=(2, 8, 48, 64), keys=(1, 48), dtype="float16"),
    Case("one query", q=(2, 4, 1, 64), keys=(2, 257)),
    Case("one query, grouped float16", q=(2, 8, 1, 64), keys=(2, 200), dtype="float16"),
    Case("one query, key lengths", q=(3, 4, 1, 64), keys=(4, 100), options={"key_lengths": [100, 13, 0]}),
    Case(
        "three queries after a cache",
        q=(1, 2, 3, 64),
        keys=(2, 300),
        options={"is_causal": True, "alignment": "bottom_right"},
    ),
    Case("bool mask", q=(2, 2, 30, 64), keys=(2, 70), mask="bool"),
    Case("additive mask", q=(2, 2, 30, 64), keys=(2, 70), mask="additive"),
    Case("additive mask float16", q=(2, 2, 30, 64), keys=(2, 70), mask="additive", dtype="float16"),
    Case("key lengths", q=(3, 2, 20, 64), keys=(2, 70), options={"key_lengths": [70, 13, 0]}),
    Case(
        "window and sinks",
        q=(1, 2, 150, 64),
        keys=(2, 150),
        options={"is_causal": True, "window": (20, None), "sinks": 3},
    ),
    Case("two-sided window", q=(1, 2, 100, 64), keys=(2, 120), options={"window": (9, 17)}),
    Case("scale", q=(1, 2, 40, 64), keys=(2, 40), options={"scale": 0.3}),
    Case("no keys", q=(1, 2, 10, 64), keys=(2, 0)),
    Case(
        "budget of 0.05",
        q=(1, 2, 1100, 32),
        keys=(2, 1100),
        local=True,
        options={"is_causal": True, "error": 0.05},
    ),
    Case(
        "budget of 0.05, bounded",
        q=(1, 2, 1100, 32),
        keys=(1, 1100),
        local=True,
        options={"error": 0.05, "guarantee": "bounded"},
    ),
)


def make_arrays(case: Case, seed: int) -> Arrays:
    """q, k, v, dout and perhaps attn_mask ; all float32 but for a bool mask."""
    rng = np.random.default_rng(seed)
    b, hq, nq, d = case.q
    hk, nk = case.keys
    dv = case.dv or d
    shapes = {"q": (b, hq, nq, d), "k": (b, hk, nk, d), "v": (b, hk, nk, dv), "dout": (b, hq, nq, dv)}
    arrays: Arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    if case.local:
        for name in "qk":  # directions that turn with the position, d / 2 frequencies
            place = np.arange(arrays[name].shape[2])[:, None] * 0.002 * np.arange(1, d // 2 + 1)
            turning = np.stack([np.cos(place), np.sin(place)], -1).reshape(-1, d)
            arrays[name] = (2 * turning + 0.3 * arrays[name]).astype(np.float32)
    if case.tokens_first:
        arrays = {name: np.swapaxes(np.swapaxes(x, 1, 2).copy(), 1, 2) for name, x in arrays.items()}
    if case.mask == "bool":
        arrays["attn_mask"] = rng.random((b, 1, nq, nk)) < 0.7
    elif case.mask == "additive":
        arrays["attn_mask"] = rng.standard_normal((hq, nq, nk), dtype=np.float32)
    return arrays
