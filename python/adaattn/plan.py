"""Plans: how each head of a call is, or was, carried out; for people to read, to keep as JSON, and to run again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from adaattn._library import HeadPlan

FORMS = ("dense", "tiled", "low_rank", "automatic")
"""By the C interface's number; automatic, -1, is the last."""
PRECISIONS = ("float32", "float16", "bfloat16", "int8", "float8")

RECORD = np.dtype(HeadPlan)
"""The C struct as a NumPy dtype."""
PLAN_WORDS = RECORD.itemsize // 4
"""The same in words of 4 bytes, as the torch operators take it."""

_FORMAT, _VERSION = "adaattn.plan", 1
_NAMES: dict[str, tuple[str, ...]] = {"form": FORMS, "precision": PRECISIONS, "low_precision": PRECISIONS}


@dataclass(frozen=True, eq=False)
class Plan:
    """How each (batch, query head) is carried out: NumPy arrays (B, Hq), or of a shape that broadcasts to it.

    What a call did is in its metrics (`metrics.heads.plan`); `adaattn.attention(..., plan=plan)` starts from it. The
    numbers are thresholds on shares of a row's softmax, never positions of tiles, so that a plan suits other inputs of
    the same heads, too. A plan is a first attempt: its error is judged like that of the engine's own, and a head that
    is over its budget runs again. Tiles are 64 keys by one panel of neighbouring queries.

    Raises ValueError or TypeError, naming the field, for values that no plan can have.
    """

    form: npt.NDArray[np.str_]
    """"dense": every visible score is used; "tiled": tiles of keys in classes; "low_rank": attention over a weighted
    coreset of the keys; "automatic": the engine chooses, and the other fields do not count."""
    precision: npt.NDArray[np.str_]
    """Of the products of dense heads and of high tiles: "float32", "float16", "bfloat16", "int8" or "float8"."""
    low_precision: npt.NDArray[np.str_]
    """Of the products of low tiles; the same as precision if there are none."""
    pooled: npt.NDArray[np.bool_]
    """What the screen leaves out is pooled (means of 16 keys stand for it), not dropped."""
    rank: npt.NDArray[np.int32]
    """Keys in the coreset of a low-rank head, else 0."""
    screen: npt.NDArray[np.float32]
    """Natural log, <= 0: a tile is left out if its best screened score is further below the row's best, for every
    query. -inf: none is."""
    low: npt.NDArray[np.float32]
    """Natural log, <= 0: a tile whose best screened score is further below the row's best is low. -inf: none is."""
    drop: npt.NDArray[np.float32]
    """Share, 0 to 1: a tile whose mass is at most this part of the row's sum so far is summarised."""

    def __post_init__(self) -> None:
        for field in fields(self):
            array = _checked_field(field.name, getattr(self, field.name))
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
            if array.shape != self.form.shape:
                raise ValueError(f"{field.name} has shape {array.shape}, must be that of form, {self.form.shape}")
        # Plain numbers, for torch.compile knows neither these arrays nor structs.
        object.__setattr__(self, "_shape", self.form.shape)
        object.__setattr__(self, "_words", self._records()[..., None].view(np.int32).tolist())

    @classmethod
    def automatic(cls, batch: int, heads: int) -> Plan:
        """The plan that leaves everything to the engine."""
        return cls.from_records(np.full((batch, heads), np.array((-1, 0, 0, 0, 0, 0, 0, 0), RECORD)))

    @classmethod
    def from_records(cls, records: npt.NDArray[Any]) -> Plan:
        """From the C library's structs (B, Hq), dtype RECORD."""
        parts: dict[str, Any] = {name: np.array(names)[records[name]] for name, names in _NAMES.items()}
        return cls(
            **parts,
            pooled=records["pooled"] != 0,
            **{name: records[name].copy() for name in ("rank", "screen", "low", "drop")},
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(B, Hq)."""
        shape: tuple[int, int] = self._shape  # type: ignore[attr-defined]
        return shape

    def records(self, batch: int, heads: int) -> npt.NDArray[Any]:
        """The C library's structs for a call, (batch, heads) contiguous. A plan of one batch entry serves all.

        Raises ValueError if the plan is for another number of heads or of batch entries.
        """
        self._check_call(batch, heads)
        records: npt.NDArray[Any] = np.broadcast_to(self._records(), (batch, heads)).copy()
        return records

    def words(self, batch: int, heads: int) -> list[list[list[int]]]:
        """records() as [batch][heads][PLAN_WORDS] integers of 32 bits, for torch, which has no structs."""
        self._check_call(batch, heads)
        words: list[list[list[int]]] = self._words  # type: ignore[attr-defined]
        return words if len(words) == batch else words * batch

    def _check_call(self, batch: int, heads: int) -> None:
        if self.shape[1] != heads or self.shape[0] not in (1, batch):
            raise ValueError(
                f"plan is for {_counted(*self.shape)}, but q has {_counted(batch, heads)}: must be the same (a plan of "
                "1 batch entry serves any number of them)"
            )

    def _records(self) -> npt.NDArray[Any]:
        result = np.zeros(self.shape, RECORD)
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name in _NAMES:
                names = _NAMES[field.name]
                numbers = {name: names.index(name) if name != "automatic" else -1 for name in names}
                values = np.vectorize(numbers.__getitem__, otypes=[np.int32])(values)
            result[field.name] = values
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return all(np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    def describe(self) -> str:
        """A table for people: one line for each (batch entry, head). Shares are of a row's softmax."""
        header = ("batch", "head", "form", "precision", "low tiles", "left out", "rank", "screen", "low", "drop")
        rows = [self._line(b, h) for b in range(self.shape[0]) for h in range(self.shape[1])]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)
        )
        return "\n".join(line.rstrip() for line in lines)

    def _line(self, b: int, h: int) -> tuple[str, ...]:
        at = b, h
        form, precision = str(self.form[at]), str(self.precision[at])
        unused = ("",) * 7
        if form == "automatic":
            return str(b), str(h), form, *unused
        if form == "dense":
            return str(b), str(h), form, precision, *unused[1:]
        if form == "low_rank":
            return str(b), str(h), form, precision, "", "", str(self.rank[at]), "", "", ""
        no_low = self.low_precision[at] == self.precision[at] or self.low[at] == -np.inf
        no_screen = self.screen[at] == -np.inf
        return (
            str(b),
            str(h),
            form,
            precision,
            "none" if no_low else str(self.low_precision[at]),
            "none" if no_screen else "pooled" if self.pooled[at] else "dropped",
            "",
            _share(self.screen[at]),
            "" if no_low else _share(self.low[at]),
            f"{self.drop[at]:.1e}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested lists by field; thresholds of -inf are None, which JSON can say."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that to_dict() wrote. Raises ValueError naming what is missing or wrong."""
        names = [field.name for field in fields(cls)]
        _check_names("plan", values, names)
        return cls(**{name: _array(name, values[name]) for name in names})

    def to_json(self, **options: Any) -> str:
        """JSON text; options are those of json.dumps."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **self.to_dict()}, **options)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that to_json() wrote. Raises ValueError for text that is not one, naming what is wrong."""
        return cls.from_dict(parse(text, _FORMAT, _VERSION))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes to_json() into a file."""
        Path(path).write_text(self.to_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Reads a file of save(). Raises OSError, or ValueError naming the file and what is wrong with it."""
        plan: Plan = load(path, cls.from_json)
        return plan


def checked_plan(plan: Any, error: float) -> Plan | None:
    """Raises TypeError or ValueError unless plan is None, or a Plan that the budget can use."""
    if plan is None:
        return None
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is of type {type(plan).__name__}, must be an adaattn.Plan or None")
    if error == 0:
        raise ValueError("plan is given, but error is 0: exact attention follows no plan; set error to the budget")
    return plan


def parse(text: str, kind: str, version: int) -> dict[str, Any]:
    """The object in JSON text of one of this package's formats, without its two first fields. Raises ValueError."""
    try:
        # NaN and Infinity are Python's extensions to JSON; the files here never hold them.
        values = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != kind:
        raise ValueError(f'is not of the format "{kind}": its field "format" is {found!r}')
    if type(values.get("version")) is not int or values["version"] != version:
        raise ValueError(f'has version {values.get("version")!r} of the format "{kind}", must be {version}')
    return {name: value for name, value in values.items() if name not in ("format", "version")}


def load(path: str | PathLike[str], read: Any) -> Any:
    """read(text of the file). Raises OSError, or ValueError that begins with the path."""
    try:
        return read(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also of text that is not UTF-8
        raise ValueError(f"{path}: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not a number")


def _check_names(what: str, values: Any, names: list[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is {type(values).__name__}, must be an object with the fields {', '.join(names)}")
    for problem, found in (("lacks", set(names) - set(values)), ("has the unknown", set(values) - set(names))):
        if found:
            raise ValueError(f"{what} {problem} field {', '.join(sorted(map(str, found)))}")


def _array(name: str, values: Any) -> Any:
    """A list of lists as an array, None as -inf."""
    try:
        array = np.array(values) if values != [] else np.empty((0, 0))
        if array.dtype == object and array.ndim == 2 and name in ("screen", "low"):
            array = np.array([[-math.inf if value is None else value for value in row] for row in values])
    except ValueError:
        raise ValueError(f"{name} is ragged, must be [batch][heads]") from None
    return array


def _checked_field(name: str, value: Any) -> npt.NDArray[Any]:
    array = np.array(value)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}, must be (batch, heads)")
    if array.size == 0:
        array = array.astype({"pooled": bool, "rank": np.int32}.get(name, np.float32 if name not in _NAMES else str))
    if name in _NAMES:
        wrong = [entry for entry in array.ravel().tolist() if entry not in _NAMES[name]]
        if wrong:
            raise ValueError(f"{name} holds {wrong[0]!r}, must be one of {', '.join(_NAMES[name])}")
        return array
    if name == "pooled":
        if array.dtype != bool:
            raise TypeError(f"pooled has dtype {array.dtype}, must be bool")
        return array
    if name == "rank":
        if array.dtype.kind not in "iu":
            raise TypeError(f"rank has dtype {array.dtype}, must be integers")
        if array.size and (array.min() < 0 or array.max() >= 2**31):
            raise ValueError(f"rank holds {array.min()} to {array.max()}, must be in 0..2**31 - 1")
        return array.astype(np.int32)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {array.dtype}, must be numbers")
    least, most = (0.0, 1.0) if name == "drop" else (-math.inf, 0.0)
    with np.errstate(invalid="ignore"):
        right = (least <= array) & (array <= most)
    if not right.all():
        allowed = "a share, 0 to 1" if name == "drop" else "a natural log <= 0, or -inf"
        raise ValueError(f"{name} holds {array[~right][0]}, must be {allowed}")
    return array.astype(np.float32)


def _plain(array: npt.NDArray[Any]) -> Any:
    values = array.tolist()
    if array.dtype.kind != "f":
        return values
    return [[value if value > -math.inf else None for value in row] for row in values]


def _share(log: Any) -> str:
    return "none" if log == -np.inf else f"{math.exp(log):.1e}"


def _counted(batch: int, heads: int) -> str:
    return f"{batch} batch entr{'y' if batch == 1 else 'ies'} of {heads} head{'' if heads == 1 else 's'}"
