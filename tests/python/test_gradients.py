"""The gradient tool: what it compares, and the command."""

import json

import numpy as np
import pytest
from adaattn.cli import main

torch = pytest.importorskip("torch")
gradients = pytest.importorskip("adaattn.gradients")


def test_a_comparison_tells_length_from_direction():
    truth = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    found = torch.tensor([[[6.0, 8.0]], [[0.0, 1.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    compared = gradients._compare(found, truth)
    np.testing.assert_allclose(compared.error, [1, 2**0.5, 0, np.inf])
    np.testing.assert_allclose(compared.cosine, [1, 0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(compared.norm_ratio, [2, 1, 1, np.inf])


@pytest.mark.parametrize("truth", ["fp64", "exact"])
def test_exact_gradients_have_no_error_but_rounding(truth):
    q, k, v = gradients.random_heads("local", 2, 200, 32, seed=1)
    k, v = k[:, :1], v[:, :1]
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    report = gradients.compare_gradients(q, k, v, dout, error=0.0, is_causal=True, truth=truth)
    for part in (report.out, report.q, report.k, report.v):
        assert part.error.max() < 1e-5, "sums of 200 float32 products"
        np.testing.assert_allclose(part.norm_ratio, 1, atol=1e-5)
    assert report.k.error.shape == (1,)
    assert report.stability.shape == (2,)
    assert report.stability.min() > 1 - 1e-9
    assert report.forms.tolist() == ["dense", "dense"]


def test_a_budget_shows_in_the_gradients_and_tighter_ones_less():
    q, k, v = gradients.random_heads("local", 1, 1100, 32, seed=1)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    loose, tight = (
        gradients.compare_gradients(
            q, k, v, dout, error=error, guarantee="bounded", kernel="cpu_bounded", is_causal=True, truth="exact"
        )
        for error in (0.3, 0.003)
    )
    assert loose.forms[0] == "tiled"
    assert loose.q.error[0] > max(1e-5, tight.q.error[0])
    assert loose.stability[0] < tight.stability[0] <= 1 + 1e-12


def test_heads_of_a_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    calls = list(gradients.model_heads(model, torch.arange(20)))
    assert len(calls) == 2
    (q, k, v), causal, scale = calls[1]
    assert q.shape == (1, 4, 20, 8)
    assert k.shape == v.shape == (1, 2, 20, 8)
    assert causal
    report = gradients.compare_gradients(q, k, v, torch.ones_like(q), error=0.0, is_causal=causal, scale=scale)
    assert report.q.error.max() < 1e-5


def test_the_command_prints_a_table_and_json(capsys, tmp_path):
    rng = np.random.default_rng(3)
    file = tmp_path / "heads.npz"
    np.savez(file, **{name: rng.standard_normal((2, 60, 16)).astype(np.float32) for name in "qkv"})
    assert main(["gradients", "--heads", str(file), "--tokens", "50", "--kernel", "cpu_flash"]) == 0
    text = capsys.readouterr().out
    assert "error budget 0.01, measured, consistent gradients; truth fp64" in text
    assert len([line for line in text.splitlines() if line.startswith("layer 0")]) == 2
    assert main(["gradients", "--heads", str(file), "--json", "--guarantee", "bounded"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["forms"] == ["dense", "dense"]
    assert max(layer["q"]["error"]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens is 0, must be at least 1"),
        (["--layers", "0"], "--layers is 0, must be at least 1"),
        (["--seed", "-1"], "--seed is -1, must be >= 0"),
        (["--heads", "none.npz"], "none.npz"),
    ],
)
def test_what_cannot_run_is_named(arguments, message, capsys):
    assert main(["gradients", *arguments]) == 2
    assert message in capsys.readouterr().err
