"""What a call reports about itself with return_metrics=True."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from adaattn._library import HeadReport

_FORMS = np.array(["dense", "tiled", "low_rank"])
_WORDS = np.dtype(HeadReport)


@dataclass(frozen=True, eq=False)
class HeadReports:
    """What each (batch, query head) took: NumPy arrays (B, Hq).

    Tiles are 64 keys by one panel of neighbouring queries; dense heads count none.
    """

    forms: npt.NDArray[np.str_]
    """"dense": every visible score was used; "tiled": tiles of keys were left out or summarised."""
    escalations: npt.NDArray[np.int32]
    """Times that the head ran again because its measured error was not accepted."""
    estimated_error: npt.NDArray[np.float64]
    """Relative Frobenius error, measured on evenly spaced rows; 0 for dense heads."""
    work: npt.NDArray[np.float64]
    """Multiply-adds, planning and verification included, over those of dense attention."""
    tiles: npt.NDArray[np.int64]
    high_tiles: npt.NDArray[np.int64]
    """Scored, exponentiated and multiplied with v."""
    summarised_tiles: npt.NDArray[np.int64]
    """Scored; their mass times their mean v stands for them."""
    dropped_tiles: npt.NDArray[np.int64]
    """Left out without being scored."""

    @classmethod
    def from_words(cls, words: Any) -> HeadReports:
        """From the C library's structs as (B, Hq, 7) 64-bit integers."""
        records = np.ascontiguousarray(words).view(_WORDS)[..., 0]
        return cls(_FORMS[records["plan"]["form"]], *(records[field.name] for field in fields(cls)[1:]))

    @property
    def form(self) -> str:
        """The one form of all heads, or "mixed"."""
        found = set(self.forms.ravel().tolist()) or {"dense"}
        return found.pop() if len(found) == 1 else "mixed"

    def to_dict(self) -> dict[str, Any]:
        """Nested lists by name."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Metrics:
    """How one attention call was carried out, and what its softmax looked like.

    entropy and max_probability are None or (B, Hq) float32 arrays like the inputs (NumPy, or torch on their device).
    """

    kernel: str
    """Name of the kernel that ran, as `adaattn info` lists it."""
    form: str
    """How the scores were represented: "dense" (all of them), "tiled" (those that the budget needs) or "mixed"."""
    compute_precision: str
    """Precision of the products: "float32", "float64" for the reference kernel, the dtype of q for matrix units of a
    GPU, which sum in float32."""
    error_budget: float
    """The budget that was asked for: relative Frobenius error per (batch, query head); 0 is exact."""
    entropy: Any
    """Entropy of the softmax in nats, mean over the rows of each head; nan if there are no rows, None if no kernel that
    takes the call reports it."""
    max_probability: Any
    """Largest softmax entry of a row, mean over the rows of each head; nan or None as for entropy."""
    memory_saved_gb: float
    """10^9 bytes that the scores B * Hq * Nq * Nk would take in the dtype of q; no kernel here writes them out."""
    heads: HeadReports | None
    """By head, or None if the call was handed to PyTorch or no kernel reports by head."""
    fallback: str | None
    """Why something slower or safer than the first choice ran, or None if the first choice did."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and nested lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    def to_json(self, **options: Any) -> str:
        """The same as JSON text; options are those of json.dumps."""
        return json.dumps(self.to_dict(), **options)


def _plain(value: Any) -> Any:
    if isinstance(value, HeadReports):
        return value.to_dict()
    return value.tolist() if hasattr(value, "tolist") else value
