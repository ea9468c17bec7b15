"""AdaAttn as an attention implementation of Hugging Face transformers, attn_implementation="adaattn"."""

from __future__ import annotations

from typing import Any

import torch

from adaattn import hooks
from adaattn._checks import SUPPORTED_DTYPES, checked_error
from adaattn._fallbacks import calls
from adaattn.functional import attention

IMPLEMENTATION = "adaattn"

_error_budget: float | None = None


def register_transformers(error: float | None = None) -> None:
    """Makes "adaattn" an attention implementation of transformers, for models loaded before or after.

    Then AutoModel.from_pretrained(..., attn_implementation="adaattn") and model.set_attn_implementation("adaattn")
    work. Masks are the boolean ones that transformers builds for "sdpa", with padding and sliding windows; keys and
    values are not repeated for grouped-query attention; key-value caches need nothing special. What AdaAttn cannot
    take (dropout while training, a learned position bias, paged caches, ...) goes to transformers' "sdpa"
    implementation, counted in adaattn.hook_statistics().

    Args:
        error: The budget of such models' calls from now on, see adaattn.attention. None leaves it as it is: at first
            that of adaattn.enable() while enabled, else 0, exact. A config's own attribute adaattn_error goes first.

    Raises:
        ImportError: transformers is not installed.
        ValueError, TypeError: error is negative, not finite or not a number.
    """
    global _error_budget
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if error is not None:
        _error_budget = checked_error(error)
    AttentionInterface.register(IMPLEMENTATION, adaattn_attention_forward)
    # Without a mask function of the same name transformers passes no mask at all, and padding would be attended to.
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def adaattn_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in each attention layer.

    query [B, Hq, Nq, D], key and value [B, Hk, Nk, D], attention_mask None or boolean or additive [B, 1|Hq, Nq, Nk].
    Returns (out [B, Nq, Hq, D] contiguous, None).
    """
    causal = _is_causal(module, query, attention_mask, is_causal)
    reason = _why_not(query, attention_mask, dropout, kwargs)
    if reason is None:
        try:
            out = attention(
                query,
                key,
                value,
                error=_budget(module),
                is_causal=causal,
                attn_mask=attention_mask,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        except NotImplementedError as refusal:
            reason = str(refusal)
        else:
            if not torch.compiler.is_dynamo_compiling():  # counting takes a lock, which would break the graph
                calls.count_taken()
            return out.transpose(1, 2).contiguous(), None
    if not torch.compiler.is_dynamo_compiling():
        calls.count_returned(f"transformers: {reason}")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return result


def _budget(module: torch.nn.Module) -> float:
    of_model: float | None = getattr(getattr(module, "config", None), "adaattn_error", None)
    for budget in (of_model, _error_budget):
        if budget is not None:
            return budget
    return hooks.current_error()


def _is_causal(
    module: torch.nn.Module, query: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool | None
) -> bool:
    """Whether the diagonal is the kernel's job. With a mask it is in the mask; a single query sees its whole cache.

    The mask is left out only where the diagonal begins at the top left: no cache before the queries (sdpa_mask sees to
    it).
    """
    if attention_mask is not None or query.shape[2] == 1:
        return False
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _why_not(
    query: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """The reason why a call goes to transformers' sdpa implementation, or None."""
    if dropout > 0.0:
        return "dropout > 0"
    for name in ("cache", "position_bias", "softcap"):
        if kwargs.get(name) is not None:
            return name
    if kwargs.get("s_aux") is not None:
        # sdpa would leave them out without a word.
        raise ValueError(
            'attn_implementation="adaattn" has no learned attention sinks (s_aux): use "eager" for this model'
        )
    if kwargs.get("output_attentions"):
        return "output_attentions"
    if query.dtype not in SUPPORTED_DTYPES:
        return f"dtype {query.dtype}"
    if attention_mask is not None and attention_mask.requires_grad and torch.is_grad_enabled():
        return "attention_mask requires a gradient"
    return None
