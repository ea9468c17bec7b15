"""Sends every scaled_dot_product_attention call of a process through AdaAttn: enable(), disable(), enabled().

The hook is a kernel for aten::scaled_dot_product_attention itself, registered with PyTorch's dispatcher as a flash
attention implementation named "adaattn". docs/decisions/0002-sdpa-hook.md says why there and not at one of the fused
operators below it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from functools import partial

import torch
from torch.library import Library

from adaattn._checks import SUPPORTED_DTYPES, Budget, checked_budget
from adaattn._fallbacks import HookStatistics, calls
from adaattn._layers import LayerTracker
from adaattn._options import Guarantee
from adaattn.functional import attention
from adaattn.policy import Policy, PolicyMismatchError

IMPLEMENTATION = "adaattn"
"""The name under torch.nn.attention.activate_flash_attention_impl."""

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
# The operator is a composite one: until a backend registers a kernel, PyTorch decomposes it above autograd. The
# Autograd keys catch calls in every mode but inference mode, which skips them and lands on the backend keys.
_DISPATCH_KEYS = ("AutogradCPU", "AutogradCUDA", "CPU", "CUDA")

_lock = threading.RLock()
_budget = Budget()
_layers = LayerTracker()
_active: _Registration | None = None
_replaced_implementation: str | None = None


class _Registration:
    """Kernels on the dispatcher; remove() restores exactly what was there before."""

    def __init__(self) -> None:
        global _active
        self._library: Library | None = Library("aten", "IMPL")
        for key in _DISPATCH_KEYS:
            self._library.impl("scaled_dot_product_attention", _route, key)
        # nn.MultiheadAttention's inference fast path is one fused operator that never calls SDPA.
        self._mha_fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        _active = self

    def remove(self) -> None:
        global _active
        with _lock:
            if self._library is None:
                return
            self._library._destroy()
            self._library = None
            torch.backends.mha.set_fastpath_enabled(self._mha_fastpath)
            if _active is self:
                _active = None


def enable(error: float = 0.0, *, guarantee: Guarantee = "measured", policy: Policy | None = None) -> None:
    """Sends every scaled_dot_product_attention call of this process, forward and backward, through AdaAttn.

    Calls that AdaAttn cannot take (dropout, a mask that needs a gradient, float64, torch.func transforms, ...) go to
    PyTorch as before; hook_statistics() counts them by reason, and the "adaattn" logger names each reason once. A
    torch.nn.attention.sdpa_kernel context that excludes FLASH_ATTENTION is respected. nn.MultiheadAttention's fused
    inference path is off meanwhile. If transformers is loaded, "adaattn" becomes one of its attention implementations,
    too. Functions that torch.compile has compiled already keep what they were compiled with. Calling it again only
    changes the budget.

    Args:
        error: The budget of each call, see adaattn.attention; 0 is exact.
        guarantee: What the budget promises, see adaattn.attention.
        policy: Learns over calls how careful each head of each layer has to be. A layer is the innermost torch module
            whose forward makes the call; global module hooks find it, two or three microseconds per module call, and
            are off without a policy. Calls outside of all modules and in compiled code are planned by the engine each
            time.

    Raises:
        ValueError, TypeError: error is negative, not finite or not a number; guarantee or policy is none.
    """
    global _replaced_implementation
    budget = checked_budget(error, guarantee, policy)
    with _lock:
        _set_budget(budget)
        if _active is None:
            _replaced_implementation = _activate()
    if "transformers" in sys.modules:
        from adaattn.hf import register_transformers

        register_transformers()


def disable() -> None:
    """Undoes enable(): the dispatcher, the flash attention implementation and nn.MultiheadAttention's fast path are as
    before it.

    No other thread may be inside an attention call meanwhile: PyTorch's dispatcher frees a kernel without waiting for
    those who run it, and such a call may raise a RuntimeError. The same holds for enable() and for the end of an
    outermost enabled(); changing the budget while enabled is safe.

    Does nothing if AdaAttn is not enabled. The transformers implementation "adaattn" stays known, so that models that
    use it keep working.
    """
    global _replaced_implementation
    with _lock:
        if _active is None:
            return
        _deactivate(_active, _replaced_implementation)
        _replaced_implementation = None
        _layers.stop()


@contextlib.contextmanager
def enabled(error: float = 0.0, *, guarantee: Guarantee = "measured", policy: Policy | None = None) -> Iterator[None]:
    """enable(...) for the length of a with block, then what was before it: off, or on with another budget. It nests.

    The hook is the process's, not the thread's: calls from other threads are routed, too; see disable() for when it may
    go on and off.
    """
    with _lock:
        was_enabled, outer_budget = is_enabled(), _budget
        enable(error, guarantee=guarantee, policy=policy)
    try:
        yield
    finally:
        with _lock:
            _set_budget(outer_budget)
            if not was_enabled:
                disable()


def is_enabled() -> bool:
    """Whether scaled_dot_product_attention calls go through AdaAttn now."""
    return _active is not None


def current_budget() -> Budget:
    """That of enable() while enabled, else exact."""
    return _budget if is_enabled() else Budget()


def current_error() -> float:
    """The budget of enable() while enabled, else 0."""
    return current_budget().error


def _set_budget(budget: Budget) -> None:
    global _budget
    _budget = budget
    if budget.policy is None:
        _layers.stop()
    else:
        _layers.start()


def hook_statistics(*, reset: bool = False) -> HookStatistics:
    """Calls taken and handed back (by reason) since the process began or the last reset, through the hook or
    transformers."""
    return calls.statistics(reset=reset)


def _activate() -> str | None:
    """Installs the hook; returns the flash attention implementation that it replaces, if any."""
    registry = torch.nn.attention
    replaced = registry.current_flash_attention_impl()
    registry.register_flash_attention_impl(IMPLEMENTATION, register_fn=_Registration)
    registry.activate_flash_attention_impl(IMPLEMENTATION)
    return replaced


def _deactivate(registration: _Registration, replaced: str | None) -> None:
    torch.nn.attention.restore_flash_attention_impl()
    registration.remove()  # has been called already, unless somebody replaced the registry's entry behind our back
    if replaced is not None:
        torch.nn.attention.activate_flash_attention_impl(replaced)


def _route(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What runs in place of aten::scaled_dot_product_attention."""
    reason = why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is None:
        q, k, v, mask = (_to_4d(tensor) for tensor in (query, key, value, attn_mask))
        budget = _budget
        layer = None if budget.policy is None else _layers.current
        attend = attention if budget.policy is None or layer is None else partial(budget.policy.attention, layer)
        try:
            out: torch.Tensor = attend(
                q,
                k,
                v,
                error=budget.error,
                guarantee=budget.guarantee,
                is_causal=is_causal,
                attn_mask=mask,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        except PolicyMismatchError:
            raise
        except (NotImplementedError, ValueError, TypeError) as refusal:  # the last word on what a kernel takes
            reason = str(refusal)
        else:
            calls.count_taken()
            return out if query.dim() == 4 else out[0]
    calls.count_returned(reason)
    result: torch.Tensor = _SDPA.decompose(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return result


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """The reason why an SDPA call cannot go through AdaAttn, or None. Reads shapes and types only, never data."""
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention is switched off (torch.nn.attention.sdpa_kernel)"
    if torch._C._are_functorch_transforms_active():
        return "function transforms (torch.func)"
    if dropout_p > 0:
        return "dropout_p > 0"
    if query.dtype not in SUPPORTED_DTYPES:
        return f"dtype {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if not query.device == key.device == value.device:
        return "query, key and value are on different devices"
    if query.dim() not in (3, 4) or not query.dim() == key.dim() == value.dim():
        return "query, key and value are not all 3-D or all 4-D"
    batch_fits = query.shape[0] == key.shape[0] == value.shape[0]
    heads_fit = key.shape[1] == value.shape[1] and (
        query.shape[1] == key.shape[1] or (enable_gqa and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0)
    )
    if query.dim() == 3:
        heads_fit = batch_fits  # 3-D: the leading dimension plays the part of the heads
        batch_fits = True
    if not batch_fits or not heads_fit or key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1]:
        return "shapes that need broadcasting or do not fit"
    return None if attn_mask is None else _why_not_mask(attn_mask, query, is_causal)


def _why_not_mask(mask: torch.Tensor, query: torch.Tensor, is_causal: bool) -> str | None:
    if is_causal:
        return "attn_mask together with is_causal"
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask of dtype {mask.dtype} for query of dtype {query.dtype}"
    if mask.device != query.device:
        return "attn_mask is on another device"
    if mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask requires a gradient"
    if mask.dim() < 2 or mask.dim() > query.dim():
        return f"attn_mask with {mask.dim()} dimensions"
    return None


def _to_4d(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Leading dimensions of size 1 up to rank 4, which is what broadcasting would add."""
    return tensor if tensor is None or tensor.dim() == 4 else tensor[(None,) * (4 - tensor.dim())]
