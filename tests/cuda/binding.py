"""The C interface for torch CUDA tensors, without the Python package's checks: what GPU tests and benchmarks call."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "python"))  # without an installation, the sources
from adaattn import _library

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3}
REPORT = np.dtype(_library.HeadReport)
PLAN = np.dtype(_library.HeadPlan)
LIBRARY = _library.library()
LIBRARY.adaattn_default_options.restype = _library.Options


class AdaAttnError(ValueError):
    """What adaattn_last_error() said."""


def view(tensor: torch.Tensor) -> _library.Tensor:
    """The C view of a 4-D CUDA tensor."""
    return _library.Tensor(
        data=tensor.data_ptr() or 64,
        dtype=DTYPES[tensor.dtype],
        device=1,
        shape=(ctypes.c_int64 * 4)(*tensor.shape),
        stride=(ctypes.c_int64 * 4)(*tensor.stride()),
    )


def check(status: int) -> None:
    """Raises AdaAttnError with the library's reason."""
    if status != 0:
        raise AdaAttnError(LIBRARY.adaattn_last_error().decode())


class _Call:
    """A prepared call; calling it launches on torch's current stream and allocates nothing."""

    def __init__(self, name: str, args: Any, keep: list[Any], device: torch.device, **options: object) -> None:
        self.args, self.keep = args, keep
        self.run = getattr(LIBRARY, f"adaattn_{name}")
        self.args.options = LIBRARY.adaattn_default_options()
        for option, value in options.items():
            setattr(self.args.options, option, value)
        if "scale" in options:
            self.args.options.has_scale = 1
        needed = ctypes.c_size_t()
        check(getattr(LIBRARY, f"adaattn_{name}_workspace")(ctypes.byref(self.args), ctypes.byref(needed)))
        self.workspace = torch.empty(needed.value, dtype=torch.uint8, device=device)
        self.args.workspace = self.workspace.data_ptr() or None
        self.args.workspace_bytes = needed.value

    def __call__(self) -> None:
        self.args.stream = torch.cuda.current_stream().cuda_stream
        check(self.run(ctypes.byref(self.args)))


class Forward(_Call):
    """adaattn_forward. With reports, a call fills `reports` [B, Hq] of REPORT, and waits for its stream if a budget is
    used; plans [B, Hq] of PLAN."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        key_lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
        max_probability: torch.Tensor | None = None,
        reports: bool = False,
        plans: np.ndarray | None = None,
        **options: object,
    ) -> None:
        args = _library.ForwardArgs(q=view(q), k=view(k), v=view(v), out=view(out))
        self.reports = np.zeros(tuple(q.shape[:2]), REPORT)
        if reports:
            args.heads = self.reports.ctypes.data
        if plans is not None:
            args.plans = plans.ctypes.data
        if mask is not None:
            args.mask = view(mask)
        arrays = {"lse": lse, "entropy": entropy, "max_probability": max_probability, "key_lengths": key_lengths}
        for name, array in arrays.items():
            if array is not None:
                setattr(args, name, array.data_ptr())
        super().__init__("forward", args, [q, k, v, out, mask, arrays, plans], q.device, **options)

    def chosen(self) -> str:
        """The kernel that takes the call."""
        text = ctypes.create_string_buffer(1 << 16)
        check(LIBRARY.adaattn_describe(ctypes.byref(self.args), text, len(text), None))
        return str(json.loads(text.value)["chosen"])


class Backward(_Call):
    """adaattn_backward; gradients is dq, dk and dv, which it writes."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        *,
        key_lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        **options: object,
    ) -> None:
        dq, dk, dv = map(view, gradients)
        args = _library.BackwardArgs(
            q=view(q), k=view(k), v=view(v), out=view(out), dout=view(dout), dq=dq, dk=dk, dv=dv
        )
        args.lse = lse.data_ptr() or None
        if key_lengths is not None:
            args.key_lengths = key_lengths.data_ptr()
        if mask is not None:
            args.mask = view(mask)
        keep = [q, k, v, out, lse, dout, gradients, key_lengths, mask]
        super().__init__("backward", args, keep, q.device, **options)


def merge(
    parts: list[torch.Tensor], lses: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor | None = None
) -> None:
    """adaattn_merge on torch's current stream."""
    views = (_library.Tensor * len(parts))(*map(view, parts))
    pointers = (ctypes.c_void_p * len(lses))(*(array.data_ptr() for array in lses))
    args = _library.MergeArgs(parts=ctypes.addressof(views), part_lses=ctypes.addressof(pointers), count=len(parts))
    args.out = view(out)
    args.lse = None if lse is None else lse.data_ptr()
    args.stream = torch.cuda.current_stream().cuda_stream
    check(LIBRARY.adaattn_merge(ctypes.byref(args)))
