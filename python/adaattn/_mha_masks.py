"""The masks of nn.MultiheadAttention (True hides) put together as one mask of adaattn.attention (True shows)."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def merge_masks(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    *,
    heads: int,
    extra_keys: int,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """attn_mask [L, S] or [B * heads, L, S] and key_padding_mask [B, S], each boolean (True hides) or additive, as one
    mask.

    Returns None or [B|1, heads|1, L|1, S + extra_keys]: boolean (True shows) if both are, else additive in dtype.
    Nothing is expanded that broadcasting can do, so padding alone costs B * S. The extra keys (bias_k, add_zero_attn)
    are seen by every query.
    """
    masks = []
    if attn_mask is not None:
        shape = (1, 1, *attn_mask.shape) if attn_mask.dim() == 2 else (-1, heads, *attn_mask.shape[1:])
        masks.append(attn_mask.reshape(shape))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return F.pad(~hidden, (0, extra_keys), value=True)
    added = [additive(mask, dtype) for mask in masks]
    return F.pad(added[0] if len(added) == 1 else added[0] + added[1], (0, extra_keys))


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of nn.MultiheadAttention as numbers to add to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)


def causal_mask(length: int, keys: int, device: torch.device) -> torch.Tensor:
    """[length, keys] boolean, True after the diagonal that starts at the top left."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).triu_(1)


def softmax_weights(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, *, is_causal: bool = False
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + mask) [B, H, L, S] in plain PyTorch, differentiable; rows that see no key are 0.

    mask: as merge_masks returns it. Takes memory for all L * S entries, as whoever asks for the weights must.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if is_causal:
        scores = scores.masked_fill(causal_mask(q.shape[-2], k.shape[-2], q.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # A row of -inf alone would be nan forward and backward.
    blind = (scores.detach() == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
