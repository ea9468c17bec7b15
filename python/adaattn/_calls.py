"""The calls into the C library on views: one place that fills its structs. Knows neither NumPy arrays nor tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import addressof, byref
from typing import Any, NamedTuple

from adaattn import _library
from adaattn._arrays import NO_VIEW, View
from adaattn._options import flat

_FORWARD = _library.packer(_library.ForwardArgs)
_BACKWARD = _library.packer(_library.BackwardArgs)
_MEASURE = _library.packer(_library.MeasureArgs)

# Takes a number of bytes, returns the address of that much memory on the inputs' device, aligned to 64 bytes.
# The memory lives until the next call with the same function, or until the function is gone.
Allocator = Callable[[int], int]


# A CallOptions, or its plain tuple from the schema of a torch operator.
Options = tuple[Any, ...]


class Execution(NamedTuple):
    """Where and how a call runs."""

    allocate: Allocator
    num_threads: int = 0  # 0: OpenMP's default
    deterministic: bool = False
    stream: int = 0


def forward(
    q: View,
    k: View,
    v: View,
    mask: View | None,
    out: View,
    lse: int,
    entropy: int,
    max_probability: int,
    key_lengths: int,
    options: Options,
    execution: Execution,
    heads: int = 0,
    plans: int = 0,
    times: int = 0,
    tile_classes: int = 0,
    summarised_mass: int = 0,
    omitted_mass: int = 0,
) -> None:
    """adaattn_forward with a workspace of its own; lse to key_lengths and heads to omitted_mass: addresses, or 0."""
    library = _library.library()
    args = _library.ForwardArgs()
    name = _kernel_name(options)
    _FORWARD.pack_into(
        args, 0, *q, *k, *v, *(mask or NO_VIEW), *out, lse, entropy, max_probability, key_lengths,
        *flat(options, addressof(name) if name else 0, execution.num_threads, execution.deterministic),
        0, 0, execution.stream, heads, plans, tile_classes, times, summarised_mass, omitted_mass,
    )  # fmt: skip
    pointer = byref(args)
    needed = ctypes.c_size_t()
    status = library.adaattn_forward_workspace(pointer, byref(needed))
    if status == 0:
        if needed.value:
            args.workspace = execution.allocate(needed.value)
            args.workspace_bytes = needed.value
        status = library.adaattn_forward(pointer)
    _library.check(status)


def backward(
    q: View,
    k: View,
    v: View,
    mask: View | None,
    out: View,
    dout: View,
    lse: int,
    dq: View,
    dk: View,
    dv: View,
    key_lengths: int,
    options: Options,
    execution: Execution,
    plans: int = 0,
    tile_classes: int = 0,
) -> None:
    """adaattn_backward with a workspace of its own; plans and tile_classes are addresses, 0 for exact attention."""
    library = _library.library()
    args = _library.BackwardArgs()
    name = _kernel_name(options)
    _BACKWARD.pack_into(
        args, 0, *q, *k, *v, *(mask or NO_VIEW), *out, *dout, lse, *dq, *dk, *dv, key_lengths,
        *flat(options, addressof(name) if name else 0, execution.num_threads, execution.deterministic),
        0, 0, execution.stream, plans, tile_classes,
    )  # fmt: skip
    pointer = byref(args)
    needed = ctypes.c_size_t()
    status = library.adaattn_backward_workspace(pointer, byref(needed))
    if status == 0:
        if needed.value:
            args.workspace = execution.allocate(needed.value)
            args.workspace_bytes = needed.value
        status = library.adaattn_backward(pointer)
    _library.check(status)


def reference_forward(
    q: View, k: View, v: View, mask: View | None, key_lengths: int, options: Options, out: int, lse: int
) -> None:
    """adaattn_reference_forward; out and lse are addresses of contiguous FP64 memory."""
    args = _library.ForwardArgs()
    _FORWARD.pack_into(
        args, 0, *q, *k, *v, *(mask or NO_VIEW), *NO_VIEW, 0, 0, 0, key_lengths, *flat(options), *[0] * 9
    )
    _library.check(_library.library().adaattn_reference_forward(byref(args), out, lse))


def reference_backward(
    q: View,
    k: View,
    v: View,
    mask: View | None,
    dout: View,
    key_lengths: int,
    options: Options,
    dq: int,
    dk: int,
    dv: int,
) -> None:
    """adaattn_reference_backward; dq, dk and dv are addresses of contiguous FP64 memory."""
    args = _library.BackwardArgs()
    _BACKWARD.pack_into(
        args, 0, *q, *k, *v, *(mask or NO_VIEW), *NO_VIEW, *dout, 0, *NO_VIEW, *NO_VIEW, *NO_VIEW, key_lengths,
        *flat(options), 0, 0, 0, 0, 0,
    )  # fmt: skip
    _library.check(_library.library().adaattn_reference_backward(byref(args), dq, dk, dv))


def merge(parts: list[View], part_lses: list[int], out: View, lse: int, num_threads: int) -> None:
    """adaattn_merge; part_lses and lse are addresses of contiguous float32 memory."""
    tensors = (_library.Tensor * len(parts))()
    pack = _library.packer(_library.Tensor).pack_into
    for index, part in enumerate(parts):
        pack(tensors, index * ctypes.sizeof(_library.Tensor), *part)
    lses = (ctypes.c_void_p * len(parts))(*part_lses)
    args = _library.MergeArgs()
    _library.packer(_library.MergeArgs).pack_into(
        args, 0, addressof(tensors), addressof(lses), len(parts), *out, lse, num_threads, 0
    )
    _library.check(_library.library().adaattn_merge(byref(args)))


class Sampling(NamedTuple):
    """What adaattn_measure looks at, and how."""

    statistics: int  # adaattn_statistic, or-ed
    power_iterations: int
    sample_rows: int
    sketch: int
    seed: int


def measure(
    q: View,
    k: View,
    v: View | None,
    mask: View | None,
    key_lengths: int,
    options: Options,
    sampling: Sampling,
    execution: Execution,
    heads: int,
    gram_q: int,
    gram_k: int,
    softmax_core: int,
) -> None:
    """adaattn_measure with a workspace of its own; key_lengths and what follows execution are addresses, 0 for none."""
    library = _library.library()
    args = _library.MeasureArgs()
    _MEASURE.pack_into(
        args, 0, *q, *k, *(v or NO_VIEW), *(mask or NO_VIEW), key_lengths,
        *flat(options, 0, execution.num_threads, execution.deterministic),
        *sampling, 0, 0, heads, gram_q, gram_k, softmax_core,
    )  # fmt: skip
    pointer = byref(args)
    needed = ctypes.c_size_t()
    status = library.adaattn_measure_workspace(pointer, byref(needed))
    if status == 0:
        args.workspace = execution.allocate(needed.value)
        args.workspace_bytes = needed.value
        status = library.adaattn_measure(pointer)
    _library.check(status)


def describe(
    problem: tuple[View, View, View, View | None, View] | None,
    statistics: bool,
    options: Options,
    key_lengths: bool = False,
    plans: int = 0,
) -> str:
    """adaattn_describe as JSON text, about the machine alone if problem (q, k, v, mask, out) is None; plans is an
    address, or 0."""
    library = _library.library()
    pointer = None
    if problem is not None:
        q, k, v, mask, out = problem
        args = _library.ForwardArgs()
        name = _kernel_name(options)
        wanted = 64 if statistics else 0  # only NULL or not is looked at
        _FORWARD.pack_into(
            args, 0, *q, *k, *v, *(mask or NO_VIEW), *out, 64, wanted, wanted, 64 if key_lengths else 0,
            *flat(options, addressof(name) if name else 0), 0, 0, 0, 0, plans, 0, 0, 0, 0,
        )  # fmt: skip
        pointer = byref(args)
    needed = ctypes.c_size_t()
    _library.check(library.adaattn_describe(pointer, None, 0, byref(needed)))
    text = ctypes.create_string_buffer(needed.value)
    _library.check(library.adaattn_describe(pointer, text, needed.value, None))
    return text.value.decode()


def _kernel_name(options: Options) -> ctypes.Array[ctypes.c_char] | None:
    name = options[-1]
    return None if name is None else ctypes.create_string_buffer(name.encode())
