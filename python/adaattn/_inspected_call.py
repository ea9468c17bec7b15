"""One forward call on NumPy arrays with everything that the library reports, classes of tiles included."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adaattn import _calls, _library, _numpy_calls, _options
from adaattn._arrays import Array, contiguous_view
from adaattn._library import TILE_KEYS, panel_rows
from adaattn.plan import FORMS, PRECISIONS

_REPORT = np.dtype(_library.HeadReport)

TILE_CLASSES = ("hidden", "dropped", "pooled", "summarised", "low", "high")
_SUMMARISED, _SUMMARISED_LOW = TILE_CLASSES.index("summarised"), 6  # of adaattn_tile_class


class Attended(NamedTuple):
    """Arrays start with (B, Hq)."""

    out: Array
    reports: Any
    """Records of adaattn_head_report."""
    tiles: npt.NDArray[np.uint8] | None
    """(B, Hq, panels, tiles), indices into TILE_CLASSES: adaattn_tile_class, summarised in either precision as one."""
    seconds: dict[str, float]
    kernel: str
    summarised_mass: npt.NDArray[np.float32]
    """(B, Hq, Nq), by row; as in the reports, where they are means."""
    omitted_mass: npt.NDArray[np.float32]

    @property
    def forms(self) -> npt.NDArray[np.str_]:
        return self._named(FORMS, "form")

    @property
    def precisions(self) -> npt.NDArray[np.str_]:
        return self._named(PRECISIONS, "precision")

    @property
    def low_precisions(self) -> npt.NDArray[np.str_]:
        return self._named(PRECISIONS, "low_precision")

    def _named(self, names: Sequence[str], field: str) -> npt.NDArray[np.str_]:
        of_heads: npt.NDArray[np.str_] = np.array(names)[self.reports["plan"][field]]
        return of_heads


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
    masses = [np.zeros(q.shape[:3], np.float32) for _ in range(2)]
    views = problem.q, problem.k, problem.v, problem.mask, contiguous_view(out)
    ran: str = json.loads(_calls.describe(views, False, options))["chosen"]
    _calls.forward(
        *views, 0, 0, 0, 0, options, _calls.Execution(_numpy_calls._Workspace()), int(heads.ctypes.data), 0,
        ctypes.addressof(times), 0 if tiles is None else int(tiles.ctypes.data),
        *(int(rows.ctypes.data) for rows in masses),
    )  # fmt: skip
    if tiles is not None:
        tiles[tiles == _SUMMARISED_LOW] = _SUMMARISED
    seconds = {name: float(getattr(times, name)) for name, *_ in _library.StageTimes._fields_}
    return Attended(out, heads, tiles, seconds, ran, *masses)
