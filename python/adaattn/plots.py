"""Pictures of an inspection: heat maps of layers and heads, and the map of one head's tiles. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaattn._inspected_call import TILE_CLASSES
from adaattn._library import TILE_KEYS, panel_rows
from adaattn.inspection import Layer

Floats = npt.NDArray[np.float64]

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
_FORMS = {"dense": "#56B4E9", "tiled": "#E69F00", "low_rank": "#CC79A7"}
_CLASSES = {
    "hidden": "#FFFFFF",
    "dropped": "#E5E5E5",
    "pooled": "#CC79A7",
    "summarised": "#56B4E9",
    "low": "#E69F00",
    "high": "#0B3C5D",
}
_MISSING = "#BBBBBB"


def check_matplotlib(option: str) -> None:
    """Raises ImportError, naming the option that needs it, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{option} needs matplotlib: pip install 'adaattn[plot]'")


@dataclass(frozen=True)
class _Map:
    """One heat map; values (layers, heads), nan where there is none."""

    title: str
    unit: str
    values: Floats
    low: float = 0
    logarithmic: bool = False
    centred: bool = False
    """Whether 1 is where good ends and bad begins."""


def heat_maps(layers: Sequence[Layer], title: str, error: float, path: Path) -> None:
    """Draws form, work, errors, masses, entropy and effective ranks of every layer and head into a PNG file."""
    from matplotlib.figure import Figure

    maps = _maps(layers, error)
    rows, heads = len(layers), max(len(layer.forms) for layer in layers)
    width, height = 1.9 + 0.24 * max(heads, 8), 1.5 + 0.19 * max(rows, 8)
    columns = 3
    figure = Figure(figsize=(columns * width, 3 * height + 0.5), dpi=130, layout="constrained")
    axes = figure.subplots(3, columns).ravel()
    _draw_forms(figure, axes[0], layers, heads)
    for axis, one in zip(axes[1:], maps, strict=True):
        _draw_map(figure, axis, one)
    for axis in axes:
        axis.set_xlabel("query head")
        axis.set_ylabel("layer")
        axis.set_xticks(_ticks(heads))
        axis.set_yticks(_ticks(rows), [str(layers[i].index) for i in _ticks(rows)])
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def tile_map(layer: Layer, head: int, title: str, path: Path) -> None:
    """Draws which class each tile of 64 keys got from each panel of queries into a PNG file. layer.tiles is set."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    assert layer.tiles is not None
    colours = [_CLASSES[name] for name in TILE_CLASSES]
    norm = BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours))
    figure = Figure(figsize=(7.6, 6.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    panels, columns = layer.tiles.shape
    extent = (0, columns * TILE_KEYS, panels * panel_rows(), 0)
    axis.imshow(
        layer.tiles, cmap=ListedColormap(colours), norm=norm, extent=extent, interpolation="nearest", aspect="auto"
    )
    axis.set_xlim(0, layer.keys)
    axis.set_ylim(layer.tokens, 0)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    axis.set_title(title, fontsize=11)
    counts = np.bincount(layer.tiles.ravel(), minlength=len(colours))
    visible = max(int(counts[1:].sum()), 1)
    entries = [
        Patch(facecolor=colours[code], edgecolor="#666666", linewidth=0.5, label=f"{name} {counts[code] / visible:.1%}")
        for code, name in reversed(list(enumerate(TILE_CLASSES)))
        if code > 0 and counts[code]
    ]
    legend = axis.legend(
        handles=entries, title=f"share of {visible:,}\nvisible tiles", loc="upper left", bbox_to_anchor=(1.01, 1)
    )
    legend.get_frame().set_linewidth(0)
    figure.savefig(path)


def _maps(layers: Sequence[Layer], error: float) -> list[_Map]:
    measured = layers[0].true_error is not None
    errors = [layer.true_error if layer.true_error is not None else layer.estimated_error for layer in layers]
    name = "error" if measured else "estimated error"
    unit = f"over the budget of {error:g}" if error > 0 else "relative, Frobenius"
    error_map = _Map(name, unit, _grid(errors) / (error or 1), centred=error > 0)
    ranks = _grid([np.where(layer.softmax_rank < 0, np.nan, layer.softmax_rank) for layer in layers])
    score_ranks = _grid([np.where(layer.score_rank < 0, np.nan, layer.score_rank) for layer in layers])
    return [
        _Map("work", "over dense attention", _grid([layer.work for layer in layers]), centred=True),
        error_map,
        _Map(
            "accounted error",
            unit,
            _grid([layer.accounted_error for layer in layers]) / (error or 1),
            centred=error > 0,
        ),
        _Map("summarised mass", "of the softmax, mean over rows", _grid([layer.summarised_mass for layer in layers])),
        _Map("omitted mass", "of the softmax, estimated", _grid([layer.omitted_mass for layer in layers])),
        _Map("entropy", "nats, mean over sampled rows", _grid([layer.entropy for layer in layers])),
        _Map("softmax: effective rank", "for 95 % of the sampled rows' energy", ranks, 1, logarithmic=True),
        _Map("scores: effective rank", "for 95 % of the energy of q kᵀ", score_ranks, 1),
    ]


def _grid(rows: Sequence[Any]) -> Floats:
    """(layers, heads), nan where a layer has fewer heads than others."""
    result = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        result[index, : len(row)] = row
    return result


def _ticks(count: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if count <= 16 * step)
    return list(range(0, count, step))


def _draw_map(figure: Any, axis: Any, one: _Map) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finite = one.values[np.isfinite(one.values)]
    high = float(finite.max(initial=one.low))
    norm: Normalize = Normalize(one.low, high if high > one.low else one.low + 1)
    if one.logarithmic:
        norm = LogNorm(one.low, max(high, 2 * one.low))
    elif one.centred:
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(high, 2))
    colours = colormaps["PuOr_r" if one.centred else "viridis"].with_extremes(bad=_MISSING)
    image = axis.imshow(np.ma.masked_invalid(one.values), cmap=colours, norm=norm, aspect="auto")
    axis.set_title(one.title, fontsize=10)
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label(one.unit, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if one.logarithmic:
        bar.ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_forms(figure: Any, axis: Any, layers: Sequence[Layer], heads: int) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    names = list(_FORMS)
    codes = _grid([[names.index(form) for form in layer.forms] for layer in layers])
    colours = ListedColormap(list(_FORMS.values())).with_extremes(bad=_MISSING)
    image = axis.imshow(
        np.ma.masked_invalid(codes), cmap=colours, norm=BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names)),
        aspect="auto",
    )  # fmt: skip
    axis.set_title("form, and times run again", fontsize=10)
    bar = figure.colorbar(image, ax=axis, pad=0.02, ticks=range(len(names)))
    bar.ax.set_yticklabels([name.replace("_", " ") for name in names], fontsize=8, rotation=90, va="center")
    for row, layer in enumerate(layers):
        for head, times in enumerate(layer.escalations):
            if times > 0:
                axis.text(head, row, str(times), ha="center", va="center", fontsize=7, color="black")
