"""NumPy arrays as the views that the C library takes: checked, never copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from adaattn import _library

Array = npt.NDArray[Any]
# The fields of adaattn_tensor in order: address, dtype, device, four sizes, four strides in elements.
View = tuple[int, int, int, int, int, int, int, int, int, int, int]

NO_VIEW: View = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)

_DTYPES = {
    np.dtype(np.float32): _library.FLOAT32,
    np.dtype(np.float16): _library.FLOAT16,
    np.dtype(np.bool_): _library.BOOL,
}
_FLOATS = "float32, float16 or bfloat16 (of the package ml_dtypes)"


def dtype_code(dtype: np.dtype[Any]) -> int | None:
    """The library's code of a NumPy dtype, None if it has none."""
    code = _DTYPES.get(dtype)
    if code is None and dtype.name == "bfloat16" and dtype.itemsize == 2 and dtype.isnative:
        return _library.BFLOAT16
    return code


def check_array(name: str, value: Any) -> Array:
    """Returns value if it is a plain NumPy array. Raises TypeError."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is of type {type(value).__name__}, must be a NumPy array like q")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored: pass attn_mask instead")
    return value


def view(name: str, value: Any) -> View:
    """View of a [batch, heads, tokens, dim] array of floats. Raises TypeError or ValueError, naming it."""
    array = check_array(name, value)
    if array.ndim != 4:
        raise ValueError(f"{name} has {array.ndim} dimensions, shape {array.shape}, must have 4: (B, H, N, D)")
    code = dtype_code(array.dtype)
    if code is None or code == _library.BOOL:
        raise TypeError(f"{name} has dtype {_dtype_text(array.dtype)}, must be {_FLOATS}")
    return _strided(name, array, code)


def mask_view(value: Any) -> View:
    """View of an attn_mask with 1 to 4 dimensions, broadcast from the right. Raises TypeError or ValueError."""
    array = check_array("attn_mask", value)
    if not 1 <= array.ndim <= 4:
        raise ValueError(
            f"attn_mask has {array.ndim} dimensions, shape {array.shape}, must have 1 to 4, "
            "broadcastable to (B, Hq, Nq, Nk)"
        )
    code = dtype_code(array.dtype)
    if code is None:
        raise TypeError(f"attn_mask has dtype {_dtype_text(array.dtype)}, must be bool, float32 or that of q")
    return _strided("attn_mask", array[(None,) * (4 - array.ndim)], code)


def key_lengths_array(value: Any, batch: int) -> Array:
    """key_lengths as a contiguous int64 array of B entries. Raises TypeError or ValueError."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size != 0:
        raise TypeError(f"key_lengths has dtype {array.dtype}, must be integers")
    if array.shape != (batch,):
        raise ValueError(f"key_lengths has shape {array.shape}, must be (B,) = ({batch},)")
    if array.dtype.kind == "u" and array.size and int(array.max()) > 2**63 - 1:
        raise ValueError(f"key_lengths has {int(array.max())}, must be in 0..Nk")
    return np.ascontiguousarray(array, dtype=np.int64)


def contiguous_view(array: Array) -> View:
    """View of an array that this package made itself."""
    code = dtype_code(array.dtype)
    assert code is not None
    return _strided("out", array, code)


def packed(dtype: int, device: int, shape: tuple[int, int, int, int]) -> View:
    """View of contiguous memory that does not exist, for questions about a call."""
    b, h, n, d = shape
    return 0, dtype, device, b, h, n, d, h * n * d, n * d, d, 1


def _dtype_text(dtype: np.dtype[Any]) -> str:
    return str(dtype) if dtype.isnative else f"{dtype} (byte-swapped)"


def _strided(name: str, array: Array, code: int) -> View:
    size = array.itemsize
    a, b, c, d = array.strides
    if a % size or b % size or c % size or d % size:
        raise ValueError(
            f"{name} has strides of {array.strides} bytes, must be multiples of {size}, the size of {array.dtype}"
        )
    # An empty array still needs an address: a view without one means "no mask" to the library.
    return array.ctypes.data or size, code, _library.CPU, *array.shape, a // size, b // size, c // size, d // size
