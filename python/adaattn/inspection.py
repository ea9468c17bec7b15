"""What AdaAttn chose for each layer and head of a model, or of stored heads, and what it cost: see `inspect_model`."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaattn._inspected_call import Attended, attend
from adaattn.functional import reference
from adaattn.measurement import Statistics, measure

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

TRUTHS = ("exact", "fp64")


@dataclass(frozen=True)
class Request:
    """What is asked of every layer."""

    error: float = 0.0
    guarantee: str = "measured"
    truth: str | None = None
    """None: errors are not measured here. "exact": against the exact float32 kernel, whose own error is some 1e-6.
    "fp64": against the FP64 reference, slow."""
    sample_rows: int = 256
    seed: int = 0
    kernel: str | None = None
    """The only kernel to consider; None: the first that fits, which for short sequences uses no budget."""
    tile_map: tuple[int, int] | None = None
    """(layer, head) whose classes of tiles are kept."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention call, of batch size 1, in float32 on the CPU. Arrays have one entry per query head."""

    index: int
    tokens: int
    keys: int
    causal: bool
    kernel: str
    forms: npt.NDArray[np.str_]
    precisions: npt.NDArray[np.str_]
    """The precision of high tiles and dense heads, with that of low tiles behind a plus sign where there are any."""
    escalations: npt.NDArray[np.int32]
    estimated_error: Floats
    """The library's own estimate of the relative Frobenius error; 0 for dense float32 heads."""
    error_bound: Floats
    """inf where none is known."""
    accounted_error: Floats
    """Estimated relative Frobenius error by summaries and dropped tiles alone; nan where it is not known: low-rank and
    bounded heads."""
    summarised_mass: Floats
    """Share of the softmax in tiles that means of v stand for, mean over the rows; nan for low-rank heads."""
    omitted_mass: Floats
    """Share of the softmax in dropped tiles, as the screen estimates it, mean over the rows; nan for low-rank heads."""
    true_error: Floats | None
    """Relative Frobenius error against the truth that was asked for."""
    work: Floats
    """Multiply-adds over those of dense attention."""
    tile_shares: dict[str, Floats]
    """Of the visible tiles, by class; nan for dense heads, which count none."""
    statistics: Statistics
    seconds: dict[str, float]
    """By stage of the call."""
    tiles: npt.NDArray[np.uint8] | None
    """(panels of queries, tiles of 64 keys), adaattn_tile_class, of the head that was asked for."""

    @property
    def softmax_rank(self) -> npt.NDArray[np.int64]:
        """Effective rank of the sampled softmax at 95 % of its energy."""
        assert self.statistics.softmax is not None
        return np.asarray(self.statistics.softmax.rank_95[0])

    @property
    def score_rank(self) -> npt.NDArray[np.int64]:
        """Effective rank of q (k - mean of k)^T at 95 % of its energy."""
        assert self.statistics.scores is not None
        return np.asarray(self.statistics.scores.rank_95[0])

    @property
    def entropy(self) -> Floats:
        """Mean over the sampled rows, in nats."""
        return np.asarray(self.statistics.entropy[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; what is not finite is None."""
        plain = {name: _plain(value) for name, value in vars(self).items() if name not in ("statistics", "tiles")}
        return {**plain, "statistics": _plain(self.statistics.to_dict())}


def inspect_heads(
    q: Array, k: Array, v: Array, request: Request, *, index: int = 0, is_causal: bool = False,
    attn_mask: Array | None = None, scale: float | None = None,
) -> tuple[Array, Layer]:  # fmt: skip
    """(out, layer) of one attention call within the budget.

    Args:
        q, k, v: (1, Hq, Nq, D), (1, Hk, Nk, D) and (1, Hk, Nk, Dv) float32 arrays.
        attn_mask, is_causal, scale: as in `adaattn.attention`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adaattn.attention`.
    """
    options: dict[str, Any] = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale, "enable_gqa": True}
    head = request.tile_map[1] if request.tile_map is not None and request.tile_map[0] == index else None
    if head is not None and head >= q.shape[1]:
        raise ValueError(f"the head of the tile map is {head}, layer {index} has {q.shape[1]}")
    call: dict[str, Any] = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale}
    budget: dict[str, Any] = {"error": request.error, "guarantee": request.guarantee, "kernel": request.kernel}
    done = attend(q, k, v, **call, **budget)
    if (
        head is not None and done.forms[0, head] == "tiled"
    ):  # apart, for a call that keeps the tiles runs no low-rank heads
        done = done._replace(tiles=attend(q, k, v, **call, **budget, with_tiles=True).tiles)
    statistics = measure(q, k, v, **options, sample_rows=request.sample_rows, seed=request.seed)
    true_error = None
    if request.truth == "fp64":
        true_error = relative_errors(done.out, reference(q, k, v, **options)[0])[0]
    elif request.truth == "exact":
        exact = attend(q, k, v, **call, error=0.0, guarantee="measured")
        true_error = relative_errors(done.out, exact.out)[0]
    return done.out, _layer(index, q, k, is_causal, done, true_error, statistics, head)


def relative_errors(out: Array, truth: Array) -> Floats:
    """||out - truth||_F / ||truth||_F over the last two dimensions; 0 where they are equal."""
    norm = np.linalg.norm(truth.astype(np.float64), axis=(-2, -1))
    error = np.linalg.norm(out.astype(np.float64) - truth, axis=(-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(error == 0, 0.0, error / norm))


def inspect_model(
    model: Any, ids: Any, request: Request, *, progress: Callable[[Layer], None] | None = None
) -> list[Layer]:
    """Runs a transformers model over one sequence; every layer's attention runs within the budget, its output goes on.

    Args:
        model: A transformers model in eval mode, on the CPU. Its attention implementation comes back as it was.
        ids: (tokens,) integer tensor.
        progress: Called with each layer as it is done.

    Returns:
        Layers in the order of the model's attention calls.

    Raises:
        ValueError: no attention call was seen, or one that AdaAttn cannot take; the message says why.
    """
    import torch

    from adaattn import hf

    hf.register_transformers()
    layers: list[Layer] = []

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0,
        scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        reason = hf._why_not(query, attention_mask, dropout, kwargs)
        if reason is not None:
            raise ValueError(f"the attention of layer {len(layers)} cannot be inspected: {reason}")
        q, k, v = (tensor.detach().float().numpy() for tensor in (query, key, value))
        mask = None if attention_mask is None else _mask_array(attention_mask)
        causal = hf._is_causal(module, query, attention_mask, is_causal)
        out, layer = inspect_heads(
            q, k, v, request, index=len(layers), is_causal=causal, attn_mask=mask, scale=scaling
        )  # fmt: skip
        layers.append(layer)
        if progress is not None:
            progress(layer)
        return torch.from_numpy(out).to(query.dtype).transpose(1, 2).contiguous(), None

    with _attention_implementation(model, attention), torch.inference_mode():
        model.base_model(input_ids=ids[None], **({"use_cache": False} if _has_cache(model) else {}))
    if not layers:
        raise ValueError("the model made no attention call through transformers' attention interface")
    _check_layer(request, len(layers))
    return layers


def inspect_stored(
    heads: list[tuple[Array, Array, Array]], request: Request, *, is_causal: bool,
    progress: Callable[[Layer], None] | None = None,
) -> list[Layer]:  # fmt: skip
    """The same for q, k, v of each layer, as `load_heads` reads them."""
    _check_layer(request, len(heads))
    layers = []
    for index, (q, k, v) in enumerate(heads):
        layers.append(inspect_heads(q, k, v, request, index=index, is_causal=is_causal)[1])
        if progress is not None:
            progress(layers[-1])
    return layers


def load_heads(path: Path) -> list[tuple[Array, Array, Array]]:
    """q, k, v by layer, (1, H, N, D) float32, from a .npz or .safetensors file.

    Arrays are named q, k and v, for more than one layer with its number in front ("0.q", "layer_11.k", "3_v", ...), and
    have shape (H, N, D) or (1, H, N, D).

    Raises:
        ValueError: the file holds something else; the message names it.
        OSError: the file cannot be read.
        ImportError: a .safetensors file, and the package safetensors is not installed.
    """
    layers: dict[int, dict[str, Array]] = {}
    for name, array in _read_arrays(path):
        match = re.fullmatch(r"(?:\D*?(\d+)\D*?[._/])?([qkv])", name)
        if match is None:
            raise ValueError(f'{path} has an array "{name}", must be named like "q" or "0.q": a layer, and q, k or v')
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or array.shape[0] != 1:
            raise ValueError(f'"{name}" of {path} has shape {array.shape}, must be (H, N, D) or (1, H, N, D)')
        part = layers.setdefault(int(match[1] or 0), {})
        if match[2] in part:
            raise ValueError(f'{path} has more than one {match[2]} of layer {match[1] or 0}, the second is "{name}"')
        part[match[2]] = np.ascontiguousarray(array, np.float32)
    for index, part in layers.items():
        if missing := set("qkv") - set(part):
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))} of layer {index}")
    if not layers:
        raise ValueError(f"{path} holds no arrays")
    return [(part["q"], part["k"], part["v"]) for _, part in sorted(layers.items())]


def _read_arrays(path: Path) -> Iterator[tuple[str, Array]]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file  # NumPy has no bfloat16

        try:
            yield from ((name, tensor.float().numpy()) for name, tensor in sorted(load_file(path).items()))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    elif path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                yield from arrays.items()
        except (zipfile.BadZipFile, ValueError) as error:  # NumPy's word for what is no archive at all
            raise ValueError(f"{path} is not a .npz file: {error}") from error
    else:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, must end in .npz or .safetensors")


def _check_layer(request: Request, count: int) -> None:
    if request.tile_map is not None and request.tile_map[0] >= count:
        raise ValueError(f"the layer of the tile map is {request.tile_map[0]}, there are {count}")


def _layer(
    index: int, q: Array, k: Array, causal: bool, done: Attended, true_error: Floats | None, statistics: Statistics,
    head: int | None,
) -> Layer:  # fmt: skip
    reports = done.reports[0]
    low = np.where(reports["low_tiles"] > 0, np.char.add("+", done.low_precisions[0]), "")
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {
            name: np.asarray(np.where(reports["tiles"] > 0, reports[f"{name}_tiles"] / reports["tiles"], np.nan))
            for name in ("high", "low", "summarised", "pooled", "dropped")
        }
    return Layer(
        index=index,
        tokens=q.shape[2],
        keys=k.shape[2],
        causal=causal,
        kernel=done.kernel,
        forms=done.forms[0],
        precisions=np.char.add(done.precisions[0], low),
        escalations=reports["escalations"].copy(),
        estimated_error=reports["estimated_error"].copy(),
        error_bound=reports["error_bound"].copy(),
        accounted_error=reports["accounted_error"].copy(),
        summarised_mass=reports["summarised_mass"].copy(),
        omitted_mass=reports["omitted_mass"].copy(),
        true_error=true_error,
        work=reports["work"].copy(),
        tile_shares=shares,
        statistics=statistics,
        seconds=done.seconds,
        tiles=None if head is None or done.tiles is None else done.tiles[0, head],
    )


def _mask_array(mask: Any) -> Array:
    import torch

    result: Array = (mask if mask.dtype == torch.bool else mask.float()).numpy()
    return result


def _has_cache(model: Any) -> bool:
    return hasattr(model.config, "use_cache")


class _attention_implementation:  # noqa: N801  # a context manager
    """Makes a function the attention of a transformers model, while it lives."""

    def __init__(self, model: Any, attention: Callable[..., Any]) -> None:
        self._model, self._before, self._attention = model, model.config._attn_implementation, attention

    def __enter__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("adaattn_inspected", self._attention)
        AttentionMaskInterface.register("adaattn_inspected", sdpa_mask)
        self._model.set_attn_implementation("adaattn_inspected")

    def __exit__(self, *_: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model.set_attn_implementation(self._before)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
