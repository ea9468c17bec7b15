"""Perplexity of a language model with PyTorch's attention and with AdaAttn's, timed side by side in one run."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from adaattn import hf
from adaattn._fallbacks import calls
from adaattn._options import Guarantee, checked_error, checked_guarantee
from adaattn.policy import Policy, PolicyStatistics

PYTORCH, ADAATTN = "pytorch", "adaattn"
_IMPLEMENTATIONS = {PYTORCH: "sdpa", ADAATTN: hf.IMPLEMENTATION}
_LOGIT_ROWS = 512  # rows of logits held at once: those of a whole chunk would take more memory than the model
_WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Pass:
    """One forward pass over a chunk."""

    tokens: int
    seconds: float  # all of it, logits and losses included
    attention_seconds: list[float]  # by layer
    losses: torch.Tensor  # [tokens - 1] float32, negative log-likelihoods in nats

    @property
    def attention(self) -> float:
        return sum(self.attention_seconds)


@dataclass(frozen=True)
class Comparison:
    """Both implementations over the same chunks."""

    passes: dict[str, list[Pass]]  # by implementation, in the order of the chunks
    returned: dict[str, int]  # attention calls that AdaAttn handed back to PyTorch, by reason
    policy: PolicyStatistics | None = None  # of the calls that used the policy, if there was one

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.passes[PYTORCH])

    def losses(self, name: str) -> torch.Tensor:
        """[scored tokens] float64, in nats."""
        return torch.cat([chunk.losses for chunk in self.passes[name]]).double()

    def perplexity(self, name: str) -> float:
        return math.exp(self.losses(name).mean().item())

    def ratio(self, seconds: Callable[[Pass], float]) -> float:
        """AdaAttn's time over PyTorch's: the median over the chunks, which one disturbed chunk cannot move."""
        pairs = zip(self.passes[ADAATTN], self.passes[PYTORCH], strict=True)
        return median(seconds(ours) / seconds(theirs) for ours, theirs in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; times in seconds, ratios AdaAttn over PyTorch."""
        result: dict[str, Any] = {"tokens": self.tokens, "scored_tokens": self.losses(PYTORCH).numel()}
        for name, chunks in self.passes.items():
            layers = [sum(layer) for layer in zip(*(chunk.attention_seconds for chunk in chunks), strict=True)]
            result[name] = {
                "perplexity": self.perplexity(name),
                "tokens_per_second": self.tokens / sum(chunk.seconds for chunk in chunks),
                "attention_seconds": sum(layers),
                "attention_seconds_by_layer": layers,
            }
        change = self.losses(ADAATTN) - self.losses(PYTORCH)
        result["perplexity_ratio"] = self.perplexity(ADAATTN) / self.perplexity(PYTORCH)
        result["largest_loss_change"] = change.abs().max().item()
        result["time_ratio"] = self.ratio(lambda chunk: chunk.seconds)
        result["attention_time_ratio"] = self.ratio(lambda chunk: chunk.attention)
        result["returned_to_pytorch"] = self.returned
        result["policy"] = None if self.policy is None else self.policy.to_dict()
        return result


def compare(
    model: Any,
    ids: torch.Tensor,
    *,
    context: int,
    error: float = 0.0,
    guarantee: Guarantee = "measured",
    policy: Policy | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Runs a transformers causal language model over ids with both implementations.

    Both see one chunk before the next begins and take turns at going first, so that a machine that slows down slows
    both. The model's attention implementation comes back as it was.

    Args:
        model: A transformers model in eval mode, with layer_idx on its attention modules (as Llama has).
        ids: [tokens] integers on the model's device, cut into chunks; a last one of 1 token is left out.
        context: Tokens per chunk, >= 2. The first token of a chunk is not scored.
        error: AdaAttn's budget.
        guarantee: What the budget promises.
        policy: Learns from chunk to chunk how careful each head has to be. Its statistics begin anew here.
        progress: Called with the number of tokens of each forward pass as it ends.

    Raises:
        ValueError: ids has fewer than 2 tokens, or context is below 2.
    """
    if context < 2:
        raise ValueError(f"context is {context}, must be at least 2 tokens")
    chunks = [chunk for chunk in ids.split(context) if chunk.numel() >= 2]
    if not chunks:
        raise ValueError(f"the text has {ids.numel()} tokens, must have at least 2")
    hf.register_transformers()
    before = model.config._attn_implementation
    model.config.adaattn_error, model.config.adaattn_guarantee = checked_error(error), checked_guarantee(guarantee)
    passes: dict[str, list[Pass]] = {PYTORCH: [], ADAATTN: []}
    with ExitStack() as stack:
        stack.callback(_restore, model, before)
        stack.enter_context(hf.policy_in_use(policy))
        for name in passes:  # a first call pays for memory and lazy set-up
            _run(model, chunks[0][:_WARM_UP_TOKENS], name)
        calls.statistics(reset=True)
        if policy is not None:
            policy.statistics(reset=True)
        for index, chunk in enumerate(chunks):
            for name in list(passes)[:: 1 if index % 2 == 0 else -1]:
                passes[name].append(_run(model, chunk, name))
                if progress is not None:
                    progress(chunk.numel())
    return Comparison(passes, calls.statistics().returned, None if policy is None else policy.statistics())


def _restore(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    del model.config.adaattn_error, model.config.adaattn_guarantee


def _run(model: Any, chunk: torch.Tensor, name: str) -> Pass:
    attention_seconds: dict[int, float] = defaultdict(float)
    model.set_attn_implementation(_register_timed(_IMPLEMENTATIONS[name], attention_seconds))
    losses = []
    with torch.inference_mode():
        start = _now(chunk.device)
        hidden = model.base_model(input_ids=chunk[None], use_cache=False).last_hidden_state[0]
        for first in range(0, chunk.numel() - 1, _LOGIT_ROWS):
            targets = chunk[first + 1 : first + 1 + _LOGIT_ROWS]
            logits = model.get_output_embeddings()(hidden[first : first + targets.numel()]).float()
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
        seconds = _now(chunk.device) - start
    by_layer = [attention_seconds[layer] for layer in sorted(attention_seconds)]
    return Pass(chunk.numel(), seconds, by_layer, torch.cat(losses).cpu())


def _register_timed(implementation: str, seconds: dict[int, float]) -> str:
    """Registers an implementation with transformers that adds the time another one takes in each layer to seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    attend = AttentionInterface()[implementation]

    def timed(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = _now(query.device)
        result = attend(module, query, *args, **kwargs)
        seconds[module.layer_idx] += _now(query.device) - start
        return result

    name = f"{implementation}_timed"
    AttentionInterface.register(name, timed)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _now(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
