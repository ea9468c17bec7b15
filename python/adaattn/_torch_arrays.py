"""Torch tensors as the views that the C library takes; memory, device and stream of a call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from adaattn import _library
from adaattn._arrays import View
from adaattn._calls import Execution

_DTYPES = {
    torch.float32: _library.FLOAT32,
    torch.float16: _library.FLOAT16,
    torch.bfloat16: _library.BFLOAT16,
    torch.bool: _library.BOOL,
}
_NOTHING: AbstractContextManager[None] = nullcontext()


def view(name: str, tensor: Tensor, q: Tensor, is_mask: bool = False) -> View:
    """View of a 4-dimensional tensor on the device of q. Raises TypeError or ValueError, naming the argument."""
    shape = tensor.shape
    if len(shape) != 4:
        meaning = "(B or 1, Hq or 1, Nq or 1, Nk or 1)" if is_mask else "(B, H, N, D)"
        raise ValueError(f"{name} has {len(shape)} dimensions, shape {tuple(shape)}, must have 4: {meaning}")
    code = _DTYPES.get(tensor.dtype)
    if code is None or (code == _library.BOOL and not is_mask):
        allowed = "bool, float32 or that of q" if is_mask else "float32, float16 or bfloat16"
        raise TypeError(f"{name} has dtype {tensor.dtype}, must be {allowed}")
    if tensor is not q:
        _check_device(name, tensor, q)
    # An empty tensor still needs an address: a view without one means "no mask" to the library.
    address = tensor.data_ptr() or 64
    return address, code, tensor.is_cuda, *shape, *tensor.stride()  # type: ignore[return-value]  # 4 and 4


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.is_cpu and q.is_cpu:
        return
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, must be where q is, on {q.device}")


def key_lengths_address(lengths: Tensor | None, q: Tensor) -> int:
    """Address of key lengths that are as the library wants them. Raises TypeError or ValueError."""
    if lengths is None:
        return 0
    if lengths.dtype != torch.int64 or not lengths.is_contiguous():
        raise TypeError(f"key_lengths is {lengths.dtype} with strides {lengths.stride()}, must be contiguous int64")
    if lengths.dim() != 1 or lengths.shape[0] != q.shape[0]:
        raise ValueError(f"key_lengths has shape {tuple(lengths.shape)}, must be (B,) = ({q.shape[0]},)")
    _check_device("key_lengths", lengths, q)
    return lengths.data_ptr()


def checked_lse(name: str, lse: Tensor, rows: Tensor) -> Tensor:
    """lse as contiguous float32 (B, H, N) for the (B, H, N, D) tensor rows. Raises TypeError or ValueError."""
    if lse.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {lse.dtype}, must be float32")
    if lse.shape != rows.shape[:3]:
        raise ValueError(f"{name} has shape {tuple(lse.shape)}, must be {tuple(rows.shape[:3])}")
    _check_device(name, lse, rows)
    return lse.contiguous()


def empty_in_order_of(tensor: Tensor, dim: int) -> Tensor:
    """A new (B, H, N, dim) tensor, in memory (B, N, H, dim) if the heads of tensor lie inside its tokens.

    So a model that splits (B, N, H * D) into heads joins them again without a copy, as with torch's own attention.
    """
    b, h, n, _ = tensor.shape
    _, head, token, _ = tensor.stride()
    inner = (dim, h * dim, 1) if head < token else (n * dim, dim, 1)
    return tensor.new_empty_strided((b, h, n, dim), (h * n * dim, *inner))


def empty_rows(tensor: Tensor) -> Tensor:
    """A new contiguous float32 (B, H, N) tensor for a (B, H, N, D) one."""
    b, h, n, _ = tensor.shape
    return tensor.new_empty_strided((b, h, n), (h * n, n, 1), dtype=torch.float32)


class _Workspace:
    """Allocates scratch memory on the device of a tensor. On CUDA it is safe to free while kernels still run, because
    torch reuses it on the same stream only."""

    def __init__(self, like: Tensor) -> None:
        self._device = like.device

    def __call__(self, size: int) -> int:
        self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory.data_ptr()


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one, where it is not."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def execution_on(tensor: Tensor) -> Execution:
    """How torch would run a call on the tensor now: its threads or stream, memory and determinism."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    if not tensor.is_cuda:
        return Execution(_Workspace(tensor), torch.get_num_threads(), deterministic)
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return Execution(_Workspace(tensor), deterministic=deterministic, stream=stream)
