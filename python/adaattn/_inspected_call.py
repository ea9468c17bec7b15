"""One forward call on NumPy arrays with everything that the library reports, classes of tiles included."""

from __future__ import annotations

import ctypes
import json
from ctypes import byref
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adaattn import _library, _numpy_calls, _options
from adaattn._arrays import Array, View, contiguous_view

_REPORT = np.dtype(_library.HeadReport)
_FORMS = np.array(["dense", "tiled", "low_rank"])
_PRECISIONS = np.array(["float32", "float16", "bfloat16", "int8", "float8"])

TILE_KEYS = 64
TILE_CLASSES = ("hidden", "dropped", "pooled", "summarised", "low", "high")


class Attended(NamedTuple):
    """Arrays start with (B, Hq)."""

    out: Array
    reports: Any
    """Records of adaattn_head_report."""
    tiles: npt.NDArray[np.uint8] | None
    """(B, Hq, panels, tiles), adaattn_tile_class."""
    seconds: dict[str, float]
    kernel: str

    @property
    def forms(self) -> npt.NDArray[np.str_]:
        return np.asarray(_FORMS[self.reports["plan"]["form"]])

    @property
    def precisions(self) -> npt.NDArray[np.str_]:
        return np.asarray(_PRECISIONS[self.reports["plan"]["precision"]])

    @property
    def low_precisions(self) -> npt.NDArray[np.str_]:
        return np.asarray(_PRECISIONS[self.reports["plan"]["low_precision"]])


def panel_rows() -> int:
    """Neighbouring queries that share a tile's class on this machine."""
    return int(_library.library().adaattn_panel_rows())


def attend(
    q: Any, k: Any, v: Any, *, error: float, guarantee: str, is_causal: bool, attn_mask: Any, scale: float | None,
    kernel: str | None = None, with_tiles: bool = False,
) -> Attended:  # fmt: skip
    """Raises as `adaattn.attention`."""
    options = _options.make_options(error, is_causal, scale, "top_left", None, 0, kernel, guarantee)
    problem = _numpy_calls._Problem(q, k, v, attn_mask, None, enable_gqa=True)
    out = np.zeros(problem.out_shape, q.dtype)
    heads = np.zeros(q.shape[:2], _REPORT)
    panels, columns = -(-q.shape[2] // panel_rows()), -(-k.shape[2] // TILE_KEYS)
    tiles = np.zeros((*q.shape[:2], panels, columns), np.uint8) if with_tiles else None
    times = _library.StageTimes()

    args = _library.ForwardArgs()
    for name, view in (("q", problem.q), ("k", problem.k), ("v", problem.v), ("out", contiguous_view(out))):
        _fill(getattr(args, name), view)
    if problem.mask is not None:
        _fill(args.mask, problem.mask)
    args.options = _library.Options(
        error=options.error, scale=options.scale or 0.0, has_scale=options.scale is not None, causal=options.causal,
        window_left=-1, window_right=-1, guarantee=options.bounded, kernel=None if kernel is None else kernel.encode(),
    )  # fmt: skip
    args.heads, args.times = heads.ctypes.data, ctypes.addressof(times)
    args.tile_classes = None if tiles is None else tiles.ctypes.data
    ran = _run(args)
    seconds = {name: float(getattr(times, name)) for name, *_ in _library.StageTimes._fields_}
    return Attended(out, heads, tiles, seconds, ran)


def _run(args: Any) -> str:
    """Describes and runs the call; returns the name of its kernel."""
    library = _library.library()
    needed = ctypes.c_size_t()
    _library.check(library.adaattn_describe(byref(args), None, 0, byref(needed)))
    text = ctypes.create_string_buffer(needed.value)
    _library.check(library.adaattn_describe(byref(args), text, needed.value, None))
    _library.check(library.adaattn_forward_workspace(byref(args), byref(needed)))
    workspace = _numpy_calls._Workspace()
    args.workspace, args.workspace_bytes = workspace(needed.value), needed.value
    _library.check(library.adaattn_forward(byref(args)))
    kernel: str = json.loads(text.value)["chosen"]
    return kernel


def _fill(tensor: Any, view: View) -> None:
    tensor.data, tensor.dtype, tensor.device = view[:3]
    tensor.shape[:], tensor.stride[:] = view[3:7], view[7:]
