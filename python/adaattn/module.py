"""AdaptiveAttention: torch.nn.MultiheadAttention on AdaAttn's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from adaattn._checks import SUPPORTED_DTYPES, checked_budget
from adaattn._mha_masks import additive, causal_mask, merge_masks, softmax_weights
from adaattn._options import Backward, Guarantee, checked_backward
from adaattn.functional import attention
from adaattn.metrics import Metrics
from adaattn.policy import Policy


class _Call(NamedTuple):
    """The arguments of nn.MultiheadAttention.forward, in its order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_padding_mask: torch.Tensor | None
    need_weights: bool
    attn_mask: torch.Tensor | None
    average_attn_weights: bool
    is_causal: bool

    def masks(self) -> list[torch.Tensor]:
        return [mask for mask in (self.attn_mask, self.key_padding_mask) if mask is not None]


_Result: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, Metrics | None]


class AdaptiveAttention(nn.MultiheadAttention):
    """Multi-head attention with an error budget; a drop-in for torch.nn.MultiheadAttention.

    Takes the same constructor arguments, has the same parameters (state dicts load both ways) and the same forward
    call; nn.TransformerEncoderLayer and its kin can hold it as self_attn.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            nn.MultiheadAttention has them.
        enable_adaptive_rank, enable_adaptive_precision: Which ways of trading accuracy for speed the budget may pay
            for. With both off it is not passed on, and every call is exact.
        error: The budget: relative Frobenius error of each (batch, head) output before the output projection, >= 0;
            0 is exact.
        guarantee: What the budget promises, "measured" or "bounded", see adaattn.attention.
        policy: Learns over calls how careful each head has to be. Several layers may share one.
        backward: Whether calls that record a gradient run exactly ("exact") or use the budget and are differentiated as
            they ran ("consistent"), see adaattn.attention.

    Raises:
        ValueError: num_heads does not divide embed_dim, a size is not positive, dropout is outside [0, 1], error is
            negative or not finite, or guarantee or backward is none.
        TypeError: error is not a number, or policy is none.

    What no kernel does is done exactly by nn.MultiheadAttention itself, and metrics.fallback says why: dropout while
    training, a floating-point attn_mask that needs a gradient, float64, or a head size that every kernel declines.
    Weights (need_weights=True) are computed beside the kernel, in plain PyTorch and in L * S memory; they can be
    differentiated.

    Differences from nn.MultiheadAttention, each where that one fails: is_causal=True needs no attn_mask; rows that see
    no key give 0, not nan; nested tensors work outside of inference, too. With is_causal=True and extra keys
    (add_bias_kv, add_zero_attn) the extra keys stay visible with and without weights.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        enable_adaptive_rank: bool = True,
        enable_adaptive_precision: bool = True,
        error: float = 0.0,
        guarantee: Guarantee = "measured",
        policy: Policy | None = None,
        backward: Backward = "exact",
    ) -> None:
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            if size is not None and size <= 0:
                raise ValueError(f"{name} must be > 0, was {size}")
        if embed_dim % num_heads != 0:
            raise ValueError(f"num_heads must divide embed_dim, were {num_heads} and {embed_dim}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], was {dropout}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.enable_adaptive_rank = enable_adaptive_rank
        self.enable_adaptive_precision = enable_adaptive_precision
        self.error, self.guarantee, self.policy = checked_budget(error, guarantee, policy)
        self.backward = checked_backward(backward)
        # nn.TransformerEncoderLayer's inference path reads the weights and never calls forward, unless there is a hook.
        self.register_forward_hook(_keep_off_the_fast_path)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, error={self.error}, guarantee={self.guarantee}, "
            f"enable_adaptive_rank={self.enable_adaptive_rank}, "
            f"enable_adaptive_precision={self.enable_adaptive_precision}"
        )

    def forward(  # key and value may be left out, and the result may carry metrics
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        return_metrics: bool = False,
    ) -> Any:
        """Attention of query over key and value.

        Args:
            query: [L, B, embed_dim], with batch_first [B, L, embed_dim], without a batch [L, embed_dim].
            key, value: [S, B, kdim] and [S, B, vdim], likewise. Left out, the call is self-attention.
            key_padding_mask: [B, S], without a batch [S]: boolean (True hides the key) or added to the scores.
            need_weights: Also return the weights. None: yes if key and value are given, as nn.MultiheadAttention.
            attn_mask: [L, S] or [B * num_heads, L, S], boolean (True hides) or added to the scores.
            average_attn_weights: Weights [B, L, S], the mean over the heads, instead of [B, num_heads, L, S].
            is_causal: Hide every key after the diagonal. An attn_mask given with it must say the same.
            return_metrics: Also return the call's adaattn.Metrics.

        Returns:
            (out, weights), as nn.MultiheadAttention: out in the shape of query, weights None without need_weights.
            For a call with query alone: out, or (out, weights) with need_weights=True.
            Either with the metrics at the end if asked for.

        Raises:
            ValueError, TypeError: inputs or masks that do not fit, by name.
        """
        alone = key is None and value is None
        if alone:
            key = value = query
        if key is None or value is None:
            raise ValueError("key and value must be given together: pass both, or neither for self-attention")
        if need_weights is None:
            need_weights = not alone
        call = _Call(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if query.is_nested or key.is_nested or value.is_nested:
            out, weights, metrics = self._attend_nested(call, return_metrics)
        else:
            _check_inputs(self, call)
            out, weights, metrics = self._attend(call, return_metrics)
        result = (out,) if alone and not need_weights else (out, weights)
        result = (*result, metrics) if return_metrics else result
        return result[0] if len(result) == 1 else result

    def _attend(self, call: _Call, return_metrics: bool) -> _Result:
        q, k, v = self._project(call.query, call.key, call.value)
        extra_keys = (self.bias_k is not None) + bool(self.add_zero_attn)
        if call.is_causal and extra_keys:  # the kernel's diagonal would hide the extra keys
            keys = k.shape[-2] - extra_keys
            diagonal = causal_mask(q.shape[-2], keys, q.device) if call.attn_mask is None else call.attn_mask
            call = call._replace(attn_mask=diagonal, is_causal=False)
        if call.key_padding_mask is not None and call.query.dim() == 2:
            call = call._replace(key_padding_mask=call.key_padding_mask[None])
        mask = merge_masks(
            None if call.is_causal else call.attn_mask,
            call.key_padding_mask,
            heads=self.num_heads,
            extra_keys=extra_keys,
            dtype=q.dtype,
        )
        reason = self._why_not(q, call)
        if reason is None:
            attend = attention if self.policy is None else partial(self.policy.attention, self)
            try:
                attended = attend(
                    q,
                    k,
                    v,
                    error=self._budget(),
                    guarantee=self.guarantee,
                    backward=self.backward,
                    is_causal=call.is_causal and mask is None,
                    # attention() takes is_causal or a mask; a window that ends at the diagonal goes with both.
                    window=(None, 0) if call.is_causal and mask is not None else None,
                    attn_mask=mask,
                    return_metrics=return_metrics,
                )
            except NotImplementedError as refusal:
                reason = str(refusal)
        if reason is not None:
            metrics = self._metrics_of_fallback(reason, q, k, mask, call.is_causal) if return_metrics else None
            return *self._fall_back(call), metrics
        heads, metrics = attended if return_metrics else (attended, None)
        weights = None
        if call.need_weights:
            weights = softmax_weights(q, k, mask, is_causal=call.is_causal)
            weights = weights.mean(dim=1) if call.average_attn_weights else weights
            weights = weights if call.query.dim() == 3 else weights[0]
        return self._join(heads, call.query), weights, metrics

    def _budget(self) -> float:
        return self.error if self.enable_adaptive_rank or self.enable_adaptive_precision else 0.0

    def _why_not(self, q: torch.Tensor, call: _Call) -> str | None:
        """The reason why no kernel takes this call, or None."""
        if self.training and self.dropout > 0.0:
            return f"dropout={self.dropout} while training"
        if q.dtype not in SUPPORTED_DTYPES:
            return f"dtype {q.dtype}"
        if torch.is_grad_enabled() and any(mask.requires_grad for mask in call.masks()):
            return "a mask requires a gradient"
        return None

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projected q [B, H, L, D], k and v [B, H, S, D], the extra keys appended; views wherever they can be."""
        if self._qkv_same_embed_dim and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = (
                self.in_proj_weight.chunk(3)
                if self._qkv_same_embed_dim
                else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            )
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = map(F.linear, (query, key, value), weights, biases)
        q, k, v = (self._to_heads(x) for x in (q, k, v))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, self._to_heads(b[0]).to(x.dtype).expand(x.shape[0], -1, -1, -1)], dim=-2)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return q, k, v

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[L, B, E], [B, L, E] or [L, E] as [B, H, L, D], a view."""
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _join(self, heads: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """[B, H, L, D] through the output projection, in the layout of query."""
        order = (0, 2, 1, 3) if self.batch_first or query.dim() == 2 else (2, 0, 1, 3)
        out: torch.Tensor = self.out_proj(heads.permute(order).reshape(*query.shape[:-1], self.embed_dim))
        return out

    def _fall_back(self, call: _Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """nn.MultiheadAttention's own forward."""
        if call.is_causal and call.attn_mask is None:
            axis = 1 if self.batch_first and call.query.dim() == 3 else 0
            mask = causal_mask(call.query.shape[axis], call.key.shape[axis], call.query.device)
            call = call._replace(attn_mask=mask)
        if len({mask.dtype for mask in call.masks()}) > 1:  # of two kinds: the parent would warn
            attn_mask, key_padding_mask = (additive(mask, call.query.dtype) for mask in call.masks())
            call = call._replace(attn_mask=attn_mask, key_padding_mask=key_padding_mask)
        if call.key_padding_mask is not None and call.query.dim() == 2:
            call = call._replace(key_padding_mask=call.key_padding_mask[0])
        return super().forward(*call)

    def _metrics_of_fallback(
        self, reason: str, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
    ) -> Metrics:
        with torch.no_grad():
            p = softmax_weights(q, k, mask, is_causal=is_causal)
        return Metrics(
            kernel="torch.nn.MultiheadAttention",
            form="dense",
            compute_precision=str(q.dtype).removeprefix("torch."),
            error_budget=self._budget(),
            guarantee=self.guarantee,
            entropy=torch.special.entr(p).sum(-1).mean(-1).float(),
            max_probability=p.amax(-1).mean(-1).float(),
            avg_rank=float(min(q.shape[-1], q.shape[-2], k.shape[-2])),
            work=1.0,
            memory_saved_gb=0.0,
            seconds=None,
            heads=None,
            fallback=reason,
        )

    def _attend_nested(self, call: _Call, return_metrics: bool) -> _Result:
        """Self-attention over a nested batch [B, *, E], as nn.TransformerEncoder makes it from a padding mask."""
        query = call.query
        if query is not call.key or query is not call.value:
            raise ValueError("nested tensors are for self-attention: query, key and value must be the same tensor")
        if call.masks() or call.need_weights:
            raise ValueError("nested tensors take no key_padding_mask, no attn_mask and need_weights=False")
        if not self.batch_first:
            raise ValueError("nested tensors need batch_first=True")
        lengths = [part.shape[0] for part in query.unbind()]
        padded = torch.nested.to_padded_tensor(query, 0.0)
        positions = torch.arange(padded.shape[1], device=query.device)
        hidden = positions >= torch.tensor(lengths, device=query.device)[:, None]
        call = call._replace(query=padded, key=padded, value=padded, key_padding_mask=hidden)
        out, _, metrics = self._attend(call, return_metrics)
        parts = [row[:length] for row, length in zip(out.unbind(), lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=query.layout), None, metrics


def _check_inputs(module: AdaptiveAttention, call: _Call) -> None:
    """Raises ValueError or TypeError for shapes and dtypes that do not fit each other or the module."""
    query, key, value = call.query, call.key, call.value
    for name, x, width in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x.dim() not in (2, 3) or x.dim() != query.dim():
            raise ValueError(f"{name} must have 2 or 3 dimensions, as many as query, had shape {tuple(x.shape)}")
        if x.shape[-1] != width:
            raise ValueError(f"the last dimension of {name} must be {width}, its shape was {tuple(x.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must be equally long, had shapes {tuple(key.shape)} and {tuple(value.shape)}")
    batched, axis = query.dim() == 3, 0 if module.batch_first else 1
    if batched and query.shape[axis] != key.shape[axis]:
        raise ValueError(
            f"query and key must have one batch size, had shapes {tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch = query.shape[axis] if batched else 1
    length, keys = (x.shape[1 - axis if batched else 0] for x in (query, key))
    if call.key_padding_mask is not None:
        _check_mask("key_padding_mask", call.key_padding_mask, [(batch, keys) if batched else (keys,)])
    if call.attn_mask is not None:
        _check_mask("attn_mask", call.attn_mask, [(length, keys), (batch * module.num_heads, length, keys)])


def _check_mask(name: str, mask: torch.Tensor, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{name} must be boolean or floating-point, was {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, had {tuple(mask.shape)}")


def _keep_off_the_fast_path(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing: that it is there is what counts."""
