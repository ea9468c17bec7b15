"""A thin ctypes view of the C interface for torch CUDA tensors: what the GPU tests and benchmarks call."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3}


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    ]


class Options(ctypes.Structure):
    _fields_ = [
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
    ]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
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
    ]


class AdaAttnError(ValueError):
    """What adaattn_last_error() said."""


def load() -> ctypes.CDLL:
    """The library at $ADAATTN_LIBRARY, or in build/."""
    default = Path(__file__).resolve().parents[2] / "build" / "src" / "libadaattn.so"
    library = ctypes.CDLL(os.environ.get("ADAATTN_LIBRARY", str(default)))
    library.adaattn_default_options.restype = Options
    library.adaattn_last_error.restype = ctypes.c_char_p
    return library


LIBRARY = load()


def view(tensor: torch.Tensor) -> Tensor:
    """The C view of a 4-D CUDA tensor."""
    return Tensor(
        data=tensor.data_ptr(),
        dtype=DTYPES[tensor.dtype],
        device=1,
        shape=(ctypes.c_int64 * 4)(*tensor.shape),
        stride=(ctypes.c_int64 * 4)(*tensor.stride()),
    )


def check(status: int) -> None:
    """Raises AdaAttnError with the library's reason."""
    if status != 0:
        raise AdaAttnError(LIBRARY.adaattn_last_error().decode())


class Forward:
    """A prepared forward call; calling it launches on torch's current stream and allocates nothing."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        key_lengths: torch.Tensor | None = None,
        **options: object,
    ) -> None:
        self.args = ForwardArgs(
            q=view(q), k=view(k), v=view(v), out=view(out), options=LIBRARY.adaattn_default_options()
        )
        self.keep = [q, k, v, out, lse, key_lengths]
        if lse is not None:
            self.args.lse = lse.data_ptr()
        if key_lengths is not None:
            self.args.key_lengths = key_lengths.data_ptr()
        for name, value in options.items():
            setattr(self.args.options, name, value)
        if "scale" in options:
            self.args.options.has_scale = 1
        needed = ctypes.c_size_t()
        check(LIBRARY.adaattn_forward_workspace(ctypes.byref(self.args), ctypes.byref(needed)))
        if needed.value:
            self.keep.append(workspace := torch.empty(needed.value, dtype=torch.uint8, device=q.device))
            self.args.workspace = workspace.data_ptr()
            self.args.workspace_bytes = needed.value

    def __call__(self) -> None:
        self.args.stream = torch.cuda.current_stream().cuda_stream
        check(LIBRARY.adaattn_forward(ctypes.byref(self.args)))
