"""adaattn.measure: what attention's inputs and softmax look like, head by head."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adaattn import _calls, _numpy_calls, _options, spectra
from adaattn._arrays import View
from adaattn._calls import Sampling
from adaattn._library import HeadStatistics
from adaattn._options import Alignment, Window
from adaattn.spectra import Spectrum

Floats = npt.NDArray[np.float64]

STATISTICS = ("range", "rows", "scores", "output", "softmax")
"""What measure() can look at, in the order of the C library's bits."""

_RECORD = np.dtype(HeadStatistics)


@dataclass(frozen=True, eq=False)
class Statistics:
    """NumPy arrays (B, Hq), one entry per (batch, query head).

    nan means not asked for, nothing to look at (no keys, no v) or inputs that are not finite. k and v are those of the
    head's key head, up to the key length. The group a statistic belongs to, by its name in `measure`, is in brackets.
    """

    largest_q: Floats
    """[range] Largest magnitude."""
    largest_k: Floats
    largest_v: Floats
    crest_q: Floats
    """[range] Largest magnitude over root mean square: an 8-bit cast to the full range rounds in steps of crest / 127
    root mean squares."""
    crest_k: Floats
    crest_v: Floats
    outliers_q: Floats
    """[range] Share of elements beyond 6 root mean squares: what an 8-bit cast to that range would clip."""
    outliers_k: Floats
    outliers_v: Floats
    key_mean: Floats
    """[range] Norm of the mean key over the root mean square norm of the keys, 0 to 1."""
    entropy: Floats
    """[rows] Entropy of a row's softmax in nats; a mean over the sampled rows that see a key, as the next three."""
    max_probability: Floats
    """[rows] Largest softmax entry of a row."""
    score_deviation: Floats
    """[rows] Standard deviation of a row's visible scores."""
    score_range: Floats
    """[rows] Largest less smallest visible score of a row."""
    sampled_rows: npt.NDArray[np.int64]
    """[rows] Sampled rows that see a key."""
    output_norm: Floats
    """[output] Root mean square of the Euclidean norms of the sampled rows' outputs."""
    importance: Floats
    """[output] The head's share of the squared norms of all heads' outputs, which is what the layer's output projection
    gets from it; the projection itself is not looked at. Sums to 1 over the heads of a batch entry."""
    scores: Spectrum | None
    """[scores] Of scale * q (k - mean of k)^T over all pairs, hidden ones included; complete, at most D."""
    softmax: Spectrum | None
    """[softmax] Of the softmax matrix, hidden entries 0, estimated from the sampled rows: their singular values times
    sqrt(Nq / rows). Ranks are those of the sample, so never above its number of rows."""
    work: dict[str, Floats]
    """Multiply-adds by group over those of dense attention. What key heads share is split among their query heads;
    "rows" has the scores that "output" and "softmax" need, too."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, nested lists and dictionaries by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _plain(value) for name, value in values.items()}


def measure(
    q: Any,
    k: Any,
    v: Any = None,
    *,
    statistics: Sequence[str] | None = None,
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    alignment: Alignment = "top_left",
    window: Window | None = None,
    sinks: int = 0,
    key_lengths: Any = None,
    sample_rows: int = 256,
    sketch: int = 0,
    power_iterations: int = 1,
    seed: int = 0,
) -> Statistics:
    """Statistics of attention(q, k, v, ...) without running it: ranges, softmax of sampled rows, spectra.

    All inputs are NumPy arrays, or all CPU tensors, as in `attention`. The same seed gives the same results on any
    number of threads.

    Args:
        statistics: Some of `adaattn.measurement.STATISTICS`; None is all of them, without "output" if there is no v.
        sample_rows: 1 to 4096 rows of q, one at random in each of so many even parts; all rows if there are fewer.
        sketch: 0: the sampled rows' singular values are computed from their Gram matrix, at sample_rows / 2
            multiply-adds per entry. 1 to 1024: only so many are estimated, by a randomized range finder (Halko,
            Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) with power_iterations (0 to 16) at
            2 (1 + power_iterations) sketch + 10 per entry; softmax.residual bounds what is left out (equation 4.3). No
            fewer than the rows sampled: as 0.
        seed: 0 to 2**64 - 1.

    Returns:
        Statistics.

    Raises:
        TypeError, ValueError: an argument is malformed or two do not fit together; the message names it.
        NotImplementedError: the tensors are not on the CPU.
    """
    options = _options.make_options(0.0, is_causal, scale, alignment, window, sinks, None)
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask are both set, must be one: put the causal part into attn_mask")
    wanted = _wanted(statistics, v is not None)
    problem = _problem(q, k, v, attn_mask, key_lengths, _options.flag("enable_gqa", enable_gqa))
    sampling = _sampling(wanted, power_iterations, sample_rows, sketch, seed)

    b, hq, nq, d = (int(size) for size in q.shape)
    rows = min(sampling.sample_rows, nq)
    core_size = sampling.sketch if 0 < sampling.sketch < rows else rows
    heads = np.zeros((b, hq), _RECORD)
    gram_q = np.zeros((b, hq, d, d) if "scores" in wanted else 0)
    gram_k = np.zeros((b, int(k.shape[1]), d, d) if "scores" in wanted else 0)
    core = np.zeros((b, hq, core_size, core_size) if "softmax" in wanted else 0)
    addresses = (array.ctypes.data for array in (heads, gram_q, gram_k, core))
    _calls.measure(
        problem.q, problem.k, problem.v, problem.mask, problem.lengths, options, sampling, problem.execution, *addresses
    )
    scores = softmax = None
    if "scores" in wanted:
        values = spectra.score_values(gram_q, gram_k, d**-0.5 if options.scale is None else options.scale)
        scores = spectra.spectrum(values, (values**2).sum(-1), np.zeros((b, hq)))
    if "softmax" in wanted:
        weight = nq / max(rows, 1)
        softmax = spectra.spectrum(
            np.sqrt(weight) * spectra.core_values(core)[..., : int(k.shape[2])],  # the rest is 0
            weight * heads["softmax_energy"],
            np.sqrt(weight) * heads["softmax_residual"],
        )
    return _statistics(heads, wanted, scores, softmax)


class _Problem(NamedTuple):
    q: View
    k: View
    v: View | None
    mask: View | None
    lengths: int
    execution: _calls.Execution
    keep: Any  # arrays that the addresses point into


def _problem(q: Any, k: Any, v: Any, attn_mask: Any, key_lengths: Any, enable_gqa: bool) -> _Problem:
    values = k if v is None else v  # for the checks
    if isinstance(q, np.ndarray):
        checked = _numpy_calls._Problem(q, k, values, attn_mask, key_lengths, enable_gqa)
        view_v = None if v is None else checked.v
        execution = _calls.Execution(_numpy_calls._Workspace())
        return _Problem(checked.q, checked.k, view_v, checked.mask, checked.lengths_address, execution, checked)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(q, torch.Tensor):
        raise TypeError(f"q is of type {type(q).__name__}, must be a NumPy array or a torch tensor")
    if not q.is_cpu:
        raise NotImplementedError(f"measure takes cpu tensors only, q is on {q.device}")
    from adaattn import _torch_calls
    from adaattn._torch_arrays import execution_on, key_lengths_address

    inputs, lengths = _torch_calls._reference_inputs(q, k, values, attn_mask, key_lengths, enable_gqa)
    address = key_lengths_address(lengths, q)
    view_v = None if v is None else inputs[2]
    return _Problem(inputs[0], inputs[1], view_v, inputs[3], address, execution_on(q), lengths)


def _wanted(statistics: Sequence[str] | None, has_values: bool) -> tuple[str, ...]:
    if statistics is None:
        return tuple(name for name in STATISTICS if has_values or name != "output")
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"statistics has {name!r}, must be some of {', '.join(STATISTICS)}")
    if not names:
        raise ValueError(f"statistics is empty, must be some of {', '.join(STATISTICS)}")
    if "output" in names and not has_values:
        raise ValueError('statistics has "output", which needs v')
    return names


def _sampling(wanted: tuple[str, ...], power_iterations: int, sample_rows: int, sketch: int, seed: int) -> Sampling:
    """Raises TypeError or ValueError, as the C library does not for what does not fit its fields."""
    allowed = {"power_iterations": (0, 16), "sample_rows": (1, 4096), "sketch": (0, 1024), "seed": (0, 2**64 - 1)}
    values = (power_iterations, sample_rows, sketch, seed)
    for (name, (least, most)), value in zip(allowed.items(), values, strict=True):
        if isinstance(value, bool) or not hasattr(type(value), "__index__"):
            raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, must be an integer")
        if not least <= operator.index(value) <= most:
            raise ValueError(f"{name} is {value}, must be in {least}..{most}")
    return Sampling(_bits(wanted), *(operator.index(value) for value in values))


def _bits(wanted: tuple[str, ...]) -> int:
    return sum(1 << index for index, name in enumerate(STATISTICS) if name in wanted)


def _statistics(heads: Any, wanted: tuple[str, ...], scores: Spectrum | None, softmax: Spectrum | None) -> Statistics:
    names = _RECORD.names or ()
    copied = {field.name: heads[field.name].copy() for field in fields(Statistics) if field.name in names}
    squares = copied["output_norm"] ** 2
    total = squares.sum(-1, keepdims=True)
    copied["importance"] = np.divide(squares, total, out=np.full(squares.shape, np.nan), where=total > 0)
    copied["work"] = {name: heads["work"][..., i].copy() for i, name in enumerate(STATISTICS)}
    return Statistics(**copied, scores=scores, softmax=softmax)


def _plain(value: Any) -> Any:
    if isinstance(value, Spectrum):
        return value.to_dict()
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
