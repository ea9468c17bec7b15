"""AdaAttn as an attention implementation of Hugging Face transformers, attn_implementation="adaattn"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from adaattn import hooks
from adaattn._checks import SUPPORTED_DTYPES, Budget
from adaattn._fallbacks import calls
from adaattn._options import Guarantee, checked_error, checked_guarantee
from adaattn.functional import attention
from adaattn.policy import Policy, checked_policy

IMPLEMENTATION = "adaattn"


class _Settings(NamedTuple):
    """What register_transformers() was given; None: that of enable()."""

    error: float | None = None
    guarantee: Guarantee | None = None
    policy: Policy | None = None


_settings = _Settings()


def register_transformers(
    error: float | None = None, *, guarantee: Guarantee | None = None, policy: Policy | None = None
) -> None:
    """Makes "adaattn" an attention implementation of transformers, for models loaded before or after.

    Then AutoModel.from_pretrained(..., attn_implementation="adaattn") and model.set_attn_implementation("adaattn")
    work. Masks are the boolean ones that transformers builds for "sdpa", with padding and sliding windows; keys and
    values are not repeated for grouped-query attention; key-value caches need nothing special. What AdaAttn cannot
    take (dropout while training, a learned position bias, paged caches, ...) goes to transformers' "sdpa"
    implementation, counted in adaattn.hook_statistics().

    Args:
        error: The budget of such models' calls from now on, see adaattn.attention. None leaves it as it is: at first
            that of adaattn.enable() while enabled, else 0, exact. A config's own attribute adaattn_error goes first.
        guarantee: What the budget promises, likewise; at first "measured". A config's adaattn_guarantee goes first.
        policy: Learns over calls how careful each head of each attention module has to be, likewise; at first none.

    Raises:
        ImportError: transformers is not installed.
        ValueError, TypeError: error is negative, not finite or not a number; guarantee or policy is none.
    """
    global _settings
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    _settings = _Settings(
        _settings.error if error is None else checked_error(error),
        _settings.guarantee if guarantee is None else checked_guarantee(guarantee),
        _settings.policy if policy is None else checked_policy(policy),
    )
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
            budget = _budget(module)
            attend = attention if budget.policy is None else partial(budget.policy.attention, module)
            out = attend(
                query,
                key,
                value,
                error=budget.error,
                guarantee=budget.guarantee,
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


@contextmanager
def policy_in_use(policy: Policy | None) -> Iterator[None]:
    """The policy of all models for the length of a block, None for that of enable()."""
    global _settings
    outer = _settings.policy
    _settings = _settings._replace(policy=policy)
    try:
        yield
    finally:
        _settings = _settings._replace(policy=outer)


def _budget(module: torch.nn.Module) -> Budget:
    """The config's own attributes first, then register_transformers(), then enable()."""
    config, last = getattr(module, "config", None), hooks.current_budget()
    candidates = zip(
        (getattr(config, "adaattn_error", None), getattr(config, "adaattn_guarantee", None), None),
        _settings,
        last,
        strict=True,
    )
    return Budget(*(next((x for x in each if x is not None), None) for each in candidates))  # type: ignore[arg-type]


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
