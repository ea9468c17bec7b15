"""The C library: its structs as include/adaattn/adaattn.h declares them, loading it, and its errors as exceptions."""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

ABI_VERSION = 3

FLOAT32, FLOAT16, BFLOAT16, BOOL = range(4)
CPU, CUDA = range(2)
TOP_LEFT, BOTTOM_RIGHT = range(2)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )


class Options(ctypes.Structure):
    _fields_ = (
        ("error", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("has_scale", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("alignment", ctypes.c_int32),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("sinks", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
        ("deterministic", ctypes.c_int32),
        ("guarantee", ctypes.c_int32),
        ("kernel", ctypes.c_char_p),
    )


class ForwardArgs(ctypes.Structure):
    _fields_ = (
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("mask", Tensor),
        ("out", Tensor),
        ("lse", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("max_probability", ctypes.c_void_p),
        ("key_lengths", ctypes.c_void_p),
        ("options", Options),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("heads", ctypes.c_void_p),
        ("plans", ctypes.c_void_p),
        ("tile_classes", ctypes.c_void_p),
        ("times", ctypes.c_void_p),
        ("summarised_mass", ctypes.c_void_p),
        ("omitted_mass", ctypes.c_void_p),
    )


class HeadPlan(ctypes.Structure):
    _fields_ = (
        ("form", ctypes.c_int32),
        ("precision", ctypes.c_int32),
        ("low_precision", ctypes.c_int32),
        ("pooled", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("screen", ctypes.c_float),
        ("low", ctypes.c_float),
        ("drop", ctypes.c_float),
    )


class HeadReport(ctypes.Structure):
    _fields_ = (
        ("plan", HeadPlan),
        ("escalations", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("estimated_error", ctypes.c_double),
        ("estimated_limit", ctypes.c_double),
        ("error_bound", ctypes.c_double),
        ("work", ctypes.c_double),
        ("tiles", ctypes.c_int64),
        ("high_tiles", ctypes.c_int64),
        ("low_tiles", ctypes.c_int64),
        ("summarised_tiles", ctypes.c_int64),
        ("pooled_tiles", ctypes.c_int64),
        ("dropped_tiles", ctypes.c_int64),
        ("saturated", ctypes.c_int64),
        ("summarised_mass", ctypes.c_double),
        ("omitted_mass", ctypes.c_double),
        ("accounted_error", ctypes.c_double),
    )


class StageTimes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in ("measure", "plan", "attend", "verify"))


HEAD_REPORT_WORDS = ctypes.sizeof(HeadReport) // 8
"""A head report in words of 8 bytes, as callers allocate it."""
STAGES = len(StageTimes._fields_)


class BackwardArgs(ctypes.Structure):
    _fields_ = (
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("mask", Tensor),
        ("out", Tensor),
        ("dout", Tensor),
        ("lse", ctypes.c_void_p),
        ("dq", Tensor),
        ("dk", Tensor),
        ("dv", Tensor),
        ("key_lengths", ctypes.c_void_p),
        ("options", Options),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("plans", ctypes.c_void_p),
        ("tile_classes", ctypes.c_void_p),
    )


class MergeArgs(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.c_void_p),
        ("part_lses", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("out", Tensor),
        ("lse", ctypes.c_void_p),
        ("num_threads", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


class HeadStatistics(ctypes.Structure):
    _fields_ = (
        *((f"{name}_{tensor}", ctypes.c_double) for name in ("largest", "crest", "outliers") for tensor in "qkv"),
        ("key_mean", ctypes.c_double),
        ("entropy", ctypes.c_double),
        ("max_probability", ctypes.c_double),
        ("score_deviation", ctypes.c_double),
        ("score_range", ctypes.c_double),
        ("output_norm", ctypes.c_double),
        ("softmax_energy", ctypes.c_double),
        ("softmax_residual", ctypes.c_double),
        ("sampled_rows", ctypes.c_int64),
        ("work", ctypes.c_double * 5),
    )


class MeasureArgs(ctypes.Structure):
    _fields_ = (
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("mask", Tensor),
        ("key_lengths", ctypes.c_void_p),
        ("options", Options),
        ("statistics", ctypes.c_uint32),
        ("power_iterations", ctypes.c_int32),
        ("sample_rows", ctypes.c_int64),
        ("sketch", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("heads", ctypes.c_void_p),
        ("gram_q", ctypes.c_void_p),
        ("gram_k", ctypes.c_void_p),
        ("softmax_core", ctypes.c_void_p),
    )


_CODES = {
    ctypes.c_void_p: "P",
    ctypes.c_char_p: "P",
    ctypes.c_size_t: "N",
    ctypes.c_int32: "i",
    ctypes.c_int64: "q",
    ctypes.c_uint32: "I",
    ctypes.c_double: "d",
    ctypes.c_float: "f",
}


def _codes(kind: Any) -> str:
    if issubclass(kind, ctypes.Structure):
        return "".join(_codes(field) for _, field in kind._fields_)
    if issubclass(kind, ctypes.Array):
        return _codes(kind._type_) * int(kind._length_)
    # c_int64 and c_size_t have names of their own, but are the platform's long types.
    return _CODES[kind]


def packer(kind: type[ctypes.Structure]) -> struct.Struct:
    """Fills a whole struct in one call from its flattened fields; ten times faster than field by field."""
    result = struct.Struct("@" + _codes(kind))
    if result.size != ctypes.sizeof(kind):
        raise AssertionError(f"{kind.__name__} packs to {result.size} bytes, ctypes says {ctypes.sizeof(kind)}")
    return result


def _candidates() -> Iterator[Path]:
    override = os.environ.get("ADAATTN_LIBRARY")
    if override:
        yield Path(override)
        return
    import adaattn

    for folder in adaattn.__path__:  # two of them in an editable install: the sources, and what was built
        yield Path(folder) / "lib" / "libadaattn.so"


_VOID, _SIZE_POINTER = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
_SIGNATURES: dict[str, list[Any]] = {
    "adaattn_forward_workspace": [_VOID, _SIZE_POINTER],
    "adaattn_backward_workspace": [_VOID, _SIZE_POINTER],
    "adaattn_forward": [_VOID],
    "adaattn_backward": [_VOID],
    "adaattn_merge": [_VOID],
    "adaattn_measure_workspace": [_VOID, _SIZE_POINTER],
    "adaattn_measure": [_VOID],
    "adaattn_reference_forward": [_VOID, _VOID, _VOID],
    "adaattn_reference_backward": [_VOID, _VOID, _VOID, _VOID],
    "adaattn_describe": [_VOID, ctypes.c_char_p, ctypes.c_size_t, _SIZE_POINTER],
}


def load(path: Path) -> ctypes.CDLL:
    """Loads one library file and declares its functions. Raises ImportError, saying what is wrong with the file."""
    try:
        library = ctypes.CDLL(str(path))  # CDLL releases the GIL during calls
        library.adaattn_abi_version.restype = ctypes.c_uint32
        found = library.adaattn_abi_version()
    except (OSError, AttributeError) as error:
        raise ImportError(f"cannot load {path}: {error}") from error
    if found != ABI_VERSION:
        raise ImportError(
            f"{path} has version {found} of the C interface, this Python package needs {ABI_VERSION}: "
            "install both from the same sources"
        )
    library.adaattn_version.restype = ctypes.c_char_p
    library.adaattn_last_error.restype = ctypes.c_char_p
    for name, argtypes in _SIGNATURES.items():
        getattr(library, name).argtypes = argtypes
        getattr(library, name).restype = ctypes.c_int
    return library


TILE_KEYS = 64
"""Neighbouring keys that share a tile's class."""


def panel_rows() -> int:
    """Neighbouring queries that share a tile's class on this machine."""
    return int(library().adaattn_panel_rows())


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The C library: $ADAATTN_LIBRARY if set, else the one inside the package. Raises ImportError."""
    tried = list(_candidates())
    for path in tried:
        if path.exists():
            return load(path)
    raise ImportError(
        "libadaattn.so was not found in " + ", ".join(map(str, tried)) + ": install the package with `pip install .`, "
        "or name a library that CMake built in the environment variable ADAATTN_LIBRARY"
    )


_EXCEPTIONS: dict[int, type[Exception]] = {
    1: ValueError,  # ADAATTN_INVALID_ARGUMENT
    2: NotImplementedError,  # ADAATTN_UNSUPPORTED
    3: RuntimeError,  # ADAATTN_WORKSPACE_TOO_SMALL
    4: RuntimeError,  # ADAATTN_INTERNAL_ERROR
}


def check(status: int) -> None:
    """Raises what a status other than OK means, with the library's message in the words of the Python call."""
    if status == 0:
        return
    message: str = library().adaattn_last_error().decode(errors="replace")
    message = re.sub(r"^mask(?=[ .])", "attn_mask", message)
    message = re.sub(r"^options\.", "", message)
    message = re.sub(r"^parts(?=\[)", "outs", re.sub(r"^part_lses(?=\[)", "lses", message))
    raise _EXCEPTIONS.get(status, RuntimeError)(message)
