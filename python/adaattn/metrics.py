"""What a call reports about itself with return_metrics=True."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from adaattn._library import HeadReport, StageTimes
from adaattn.plan import PRECISIONS, Plan

_REPORT = np.dtype(HeadReport)
_STAGES = tuple(field[0] for field in StageTimes._fields_)


@dataclass(frozen=True, eq=False)
class HeadReports:
    """What each (batch, query head) took: NumPy arrays (B, Hq).

    Tiles are 64 keys by one panel of neighbouring queries, on GPUs 128 keys by the 64 to 256 queries that the kernel
    takes at once; dense heads count none.
    """

    plan: Plan
    """What gave the output: form, precisions, thresholds. `attention(..., plan=plan)` starts from it."""
    escalations: npt.NDArray[np.int32]
    """Times that the head ran again because its error was not accepted."""
    estimated_error: npt.NDArray[np.float64]
    """Relative Frobenius error, measured on evenly spaced rows; 0 for dense float32 heads, and for dense heads on
    GPUs."""
    estimated_limit: npt.NDArray[np.float64]
    """Upper end of the estimate's confidence interval, which is what is held below the budget."""
    error_bound: npt.NDArray[np.float64]
    """Upper bound on that error; inf where none is known."""
    work: npt.NDArray[np.float64]
    """Multiply-adds, planning and verification included, over those of dense attention; 8-bit ones count half."""
    tiles: npt.NDArray[np.int64]
    high_tiles: npt.NDArray[np.int64]
    """Scored, exponentiated and multiplied with v in the plan's precision."""
    low_tiles: npt.NDArray[np.int64]
    """The same in the plan's low precision."""
    summarised_tiles: npt.NDArray[np.int64]
    """Scored; their mass times their mean v stands for them."""
    pooled_tiles: npt.NDArray[np.int64]
    """Left out without being scored; means of 16 keys and values stand for them."""
    dropped_tiles: npt.NDArray[np.int64]
    """Left out without being scored, with nothing in their place."""
    saturated: npt.NDArray[np.int64]
    """Elements of q, k and v that an 8-bit cast clipped."""
    summarised_mass: npt.NDArray[np.float64]
    """Share of the softmax in tiles that means of v stand for, mean over the rows; nan if it was not asked for (on
    GPUs, or without statistics) or is not known (low-rank heads)."""
    omitted_mass: npt.NDArray[np.float64]
    """Share of the softmax in dropped tiles, mean over the rows: an estimate from the scores that the screen gave them;
    nan likewise."""
    accounted_error: npt.NDArray[np.float64]
    """Estimated relative Frobenius error by summaries and dropped tiles alone, from their masses and means: rounding
    and pooled tiles are not counted. nan likewise, and for bounded heads, which have error_bound."""

    @classmethod
    def from_words(cls, words: Any) -> HeadReports:
        """From the C library's structs as (B, Hq, HEAD_REPORT_WORDS) 64-bit integers."""
        records = np.ascontiguousarray(words).view(_REPORT)[..., 0]
        return cls(Plan.from_records(records["plan"]), *(records[field.name] for field in fields(cls)[1:]))

    @property
    def forms(self) -> npt.NDArray[np.str_]:
        """ "dense", "tiled" or "low_rank", as the heads ran: that of the plan."""
        return self.plan.form

    @property
    def form(self) -> str:
        """The one form of all heads, or "mixed"."""
        found = set(self.forms.ravel().tolist()) or {"dense"}
        return found.pop() if len(found) == 1 else "mixed"

    @cached_property
    def precisions(self) -> tuple[str, ...]:
        """The precisions of products that really ran, the finest first."""
        tiled = self.forms == "tiled"
        high = set(self.plan.precision[~tiled | (self.high_tiles > 0)].tolist())
        low = set(self.plan.low_precision[tiled & (self.low_tiles > 0)].tolist())
        return tuple(name for name in PRECISIONS if name in high | low)

    def to_dict(self) -> dict[str, Any]:
        """Lists [batch][head] by name, those of the plan beside the others (its form is "forms"); bounds of inf,
        thresholds of -inf and nan are None, which JSON can say."""
        plan = self.plan.to_dict()
        lists = {field.name: getattr(self, field.name).tolist() for field in fields(self)[1:]}
        for name in ("error_bound", "summarised_mass", "omitted_mass", "accounted_error"):
            lists[name] = [[x if math.isfinite(x) else None for x in row] for row in lists[name]]
        return {"forms": plan.pop("form"), **lists, **plan}


@dataclass(frozen=True, eq=False)
class Metrics:
    """How one attention call was carried out, and what its softmax looked like.

    entropy and max_probability are None or (B, Hq) float32 arrays like the inputs (NumPy, or torch on their device).
    """

    kernel: str
    """Name of the kernel that ran, as `adaattn info` lists it."""
    form: str
    """How the scores were represented: "dense" (all of them), "tiled" (those that the budget needs), "low_rank" or
    "mixed"."""
    compute_precision: str
    """Precisions of the products that ran, the finest first, such as "float32" or "bfloat16+int8"; "float64" for the
    reference kernel. Sums are kept in float32, those of int8 exactly."""
    error_budget: float
    """The budget that was asked for: relative Frobenius error per (batch, query head); 0 is exact."""
    guarantee: str
    """What the budget promised: "measured" or "bounded"."""
    entropy: Any
    """Entropy of the softmax in nats, mean over the rows of each head; nan if there are no rows, None if no kernel that
    takes the call reports it."""
    max_probability: Any
    """Largest softmax entry of a row, mean over the rows of each head; nan or None as for entropy."""
    avg_rank: float
    """Mean over the heads of the largest rank that the scores in use can have: the keys in the coreset of low-rank
    heads, min(D, Nq, Nk) of all others; nan if there are no heads."""
    work: float
    """Mean over the heads of multiply-adds over those of dense attention, everything counted; 1 for exact kernels, nan
    if there are no heads."""
    memory_saved_gb: float
    """10^9 bytes that the scores B * Hq * Nq * Nk would take in the dtype of q; no kernel here writes them out."""
    seconds: dict[str, float] | None
    """Wall time of the stages "measure", "plan", "attend" and "verify"; exact kernels attend only. None on GPUs, which
    are still at work when a call returns, and if the call was handed to PyTorch."""
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


def stage_seconds(times: Any) -> dict[str, float] | None:
    """The C library's four stage times by name; None if it does not know them."""
    seconds = times.tolist()
    return None if any(map(math.isnan, seconds)) else dict(zip(_STAGES, seconds, strict=True))


def average_rank(heads: HeadReports | None, count: int, dense_rank: int) -> float:
    """Metrics.avg_rank of count heads."""
    if count == 0:
        return math.nan
    if heads is None:
        return float(dense_rank)
    return float(np.where(heads.forms == "low_rank", heads.plan.rank, dense_rank).mean())


def _plain(value: Any) -> Any:
    if isinstance(value, HeadReports):
        return value.to_dict()
    return value.tolist() if hasattr(value, "tolist") else value
