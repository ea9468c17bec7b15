"""adaattn inspect: the command, inspection of models and stored heads, and the pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import adaattn
import numpy as np
import pytest
from adaattn import inspection, plots
from adaattn.cli import inspect as command
from adaattn.cli import main
from adaattn.inspection import Request, inspect_heads, inspect_model, inspect_stored, load_heads, relative_errors

needs_torch = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")

VOCABULARY = 128
ADAPTIVE = ["--kernel", "cpu_adaptive", "--error", "0.1"]


def local_heads(rng: Any, heads: int = 2, n: int = 4096, d: int = 32) -> tuple[Any, ...]:
    """Scores are large near the diagonal alone, so that tiles far away from it can be left out."""
    place = np.arange(n)[:, None] * 0.005 * (np.arange(d // 2) + 1)
    falling = 4 * 0.85 ** np.arange(d // 2)[:, None]  # what few dimensions can hold
    turning = (falling * np.stack([np.cos(place), np.sin(place)], -1)).reshape(1, 1, n, d)
    q, k = ((turning + 0.3 * rng.standard_normal((1, heads, n, d))).astype(np.float32) for _ in range(2))
    return q, k, rng.standard_normal((1, heads, n, d), dtype=np.float32)


@pytest.fixture
def heads_file(tmp_path: Path, rng: Any) -> Path:
    layers = {f"{layer}.{name}": array for layer in (0, 1) for name, array in zip("qkv", local_heads(rng), strict=True)}
    np.savez(tmp_path / "heads.npz", **layers)
    return tmp_path / "heads.npz"


def test_what_is_reported_is_what_attention_did(rng: Any) -> None:
    q, k, v = local_heads(rng)
    request = Request(error=0.1, kernel="cpu_adaptive", truth="fp64")
    out, layer = inspect_heads(q, k, v, request, is_causal=True)
    want, metrics = adaattn.attention(q, k, v, error=0.1, is_causal=True, kernel="cpu_adaptive", return_metrics=True)
    np.testing.assert_array_equal(out, want)
    assert layer.kernel == metrics.kernel
    np.testing.assert_array_equal(layer.forms, metrics.heads.forms[0])
    assert "tiled" in layer.forms  # or the test shows nothing
    np.testing.assert_array_equal(layer.work, metrics.heads.work[0])
    np.testing.assert_array_equal(layer.estimated_error, metrics.heads.estimated_error[0])
    np.testing.assert_array_equal(layer.escalations, metrics.heads.escalations[0])
    for name in ("accounted_error", "summarised_mass", "omitted_mass"):
        np.testing.assert_array_equal(getattr(layer, name), getattr(metrics.heads, name)[0])
    assert (layer.accounted_error[layer.forms == "tiled"] > 0).all()
    truth = adaattn.reference(q, k, v, is_causal=True)[0]
    np.testing.assert_array_equal(layer.true_error, relative_errors(want, truth)[0])
    tiled = layer.forms == "tiled"
    np.testing.assert_allclose(sum(layer.tile_shares.values())[tiled], 1)
    assert all(np.isnan(share[~tiled]).all() for share in layer.tile_shares.values())
    statistics = adaattn.measure(q, k, v, is_causal=True)
    np.testing.assert_array_equal(layer.entropy, statistics.entropy[0])
    assert statistics.softmax is not None
    np.testing.assert_array_equal(layer.softmax_rank, statistics.softmax.rank_95[0])
    json.dumps(layer.to_dict(), allow_nan=False)


def test_both_truths_agree(rng: Any) -> None:
    """The exact kernel is off by some 1e-6, the error itself is a thousand times that."""
    q, k, v = local_heads(rng)
    exact, fp64 = (
        inspect_heads(q, k, v, Request(0.1, kernel="cpu_adaptive", truth=truth), is_causal=True)[1].true_error
        for truth in inspection.TRUTHS
    )
    np.testing.assert_allclose(exact, fp64, rtol=1e-2, atol=1e-5)
    assert inspect_heads(q, k, v, Request(0.1))[1].true_error is None


def test_relative_errors() -> None:
    truth = np.array([[[3.0, 4.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    out = np.array([[[3.0, 4.5]], [[0.0, 0.0]], [[1.0, 0.0]]])
    np.testing.assert_array_equal(relative_errors(out, truth), [0.1, 0, np.inf])


def test_heads_command(heads_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--heads", str(heads_file), *ADAPTIVE, "--truth", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [layer["index"] for layer in facts["layers"]] == [0, 1]
    assert facts["tokens"] == 4096
    assert facts["truth"] == "exact"
    layer = facts["layers"][0]
    assert layer["causal"] is True
    assert len(layer["forms"]) == len(layer["work"]) == len(layer["true_error"]) == 2
    assert layer["statistics"]["entropy"]
    assert main(["inspect", "--heads", str(heads_file), *ADAPTIVE, "--tokens", "4096", "--bidirectional"]) == 0
    output = capsys.readouterr()
    assert "4 heads: work" in output.out
    assert "cpu_adaptive" in output.out
    assert sum(line.split()[1:3] in (["0", "tiled"], ["1", "tiled"]) for line in output.out.splitlines() if line) > 0
    assert "layer" in output.err  # the progress


def test_bounds_are_shown(heads_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", "--heads", str(heads_file), "--error", "0.1", "--kernel", "cpu_bounded", "--truth"]
    assert main([*arguments, "--guarantee", "bounded"]) == 0
    output = capsys.readouterr().out
    assert "bound" in output.splitlines()[3].split()
    assert "largest bound" in output
    assert main([*arguments, "--guarantee", "bounded", "--json"]) == 0
    for layer in json.loads(capsys.readouterr().out)["layers"]:
        bounds = [np.inf if bound is None else bound for bound in layer["error_bound"]]
        assert all(error <= bound for error, bound in zip(layer["true_error"], bounds, strict=True))


def test_stored_heads_by_any_name(tmp_path: Path, rng: Any) -> None:
    q, k, v = (rng.standard_normal((h, 5, 4), dtype=np.float32) for h in (4, 2, 2))
    np.savez(tmp_path / "one.npz", q=q, k=k, v=v)
    np.savez(
        tmp_path / "many.npz",
        **{f"layer_{i}.{n}": a for i in (11, 2) for n, a in zip("qkv", (q + i, k, v), strict=True)},
    )
    assert [array.shape for array in load_heads(tmp_path / "one.npz")[0]] == [(1, 4, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)]
    two, eleven = load_heads(tmp_path / "many.npz")
    np.testing.assert_array_equal(two[0][0], q + 2)
    np.testing.assert_array_equal(eleven[0][0], q + 11)
    if importlib.util.find_spec("safetensors") and importlib.util.find_spec("torch"):
        import torch
        from safetensors.torch import save_file

        save_file(
            {f"3/{n}": torch.from_numpy(a).bfloat16() for n, a in zip("qkv", (q, k, v), strict=True)},
            tmp_path / "s.safetensors",
        )
        np.testing.assert_allclose(load_heads(tmp_path / "s.safetensors")[0][0][0], q, rtol=2**-8)
    layers = inspect_stored(load_heads(tmp_path / "many.npz"), Request(), is_causal=True)
    assert [layer.index for layer in layers] == [0, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weights": np.zeros((1, 2, 3))}, 'an array "weights", must be named like'),
        ({"q": np.zeros((2, 3))}, r'"q" of .* has shape \(2, 3\), must be'),
        ({"q": np.zeros((1, 2, 3)), "k": np.zeros((1, 2, 3))}, "lacks v of layer 0"),
        ({"0.q": np.zeros((1, 2, 3)), "a0.q": np.zeros((1, 2, 3))}, "more than one q of layer 0"),
        ({}, "holds no arrays"),
    ],
)
def test_bad_files(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_heads(tmp_path / "bad.npz")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("hello")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"a\.npz"):
        load_heads(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"ends in \.txt, must end in \.npz or \.safetensors"):
        load_heads(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens is 0, must be at least 1"),
        (["--bidirectional"], "--bidirectional is for --heads"),
        (["--tile-map", "0:0"], "--tile-map needs --png"),
        (["--heads", "/no/such/file.npz"], "/no/such/file.npz"),
        (["--model", "/no/such/folder"], "has no config.json"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["3", "a:b", "1:-2"])
def test_bad_tile_maps(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--tile-map", text, "--png", "x"])
    assert "must be LAYER:HEAD" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "message"), [((5, 0), "layer of the tile map is 5"), ((0, 9), "is 9, layer 0 has 2")]
)
def test_tile_maps_of_what_is_not_there(rng: Any, place: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_stored([local_heads(rng, n=64)], Request(tile_map=place), is_causal=True)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["inspect", "--png", "x"]) == 2
    assert "--png needs matplotlib: pip install 'adaattn[plot]'" in capsys.readouterr().err


@needs_matplotlib
def test_pictures(heads_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    arguments = ["inspect", "--heads", str(heads_file), *ADAPTIVE, "--png", str(folder), "--tile-map", "1:1", "--json"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    facts = json.loads(output.out)
    assert facts["files"][0] == str(folder / "heads.png")
    for file in facts["files"]:
        assert Path(file).read_bytes().startswith(b"\x89PNG")
    drawn = str(folder / "tiles_1_1.png") in facts["files"]
    assert drawn != ("no tile map of layer 1, head 1" in output.err)


@needs_matplotlib
def test_tile_map_picture(rng: Any, tmp_path: Path) -> None:
    """Every class, with the shares of the visible tiles in the legend."""
    import dataclasses

    from adaattn._library import panel_rows
    from matplotlib.figure import Figure

    _, layer = inspect_heads(*local_heads(rng, n=256), Request(), is_causal=True)
    tiles = np.arange(-(-256 // panel_rows()) * 4, dtype=np.uint8).reshape(-1, 4) % 6
    layer = dataclasses.replace(layer, tiles=tiles)
    legends = []
    savefig = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure,
            "savefig",
            lambda self, path: (legends.append(self.axes[0].get_legend()), savefig(self, path))[1],
        )
        plots.tile_map(layer, 1, "a title", tmp_path / "tiles.png")
    texts = [text.get_text() for text in legends[0].get_texts()]
    assert [text.split()[0] for text in texts] == ["high", "low", "summarised", "pooled", "dropped"]
    share = (tiles == 5).sum() / (tiles != 0).sum()
    assert texts[0] == f"high {share:.1%}"


@needs_matplotlib
def test_heat_maps_of_layers_with_gaps(rng: Any, tmp_path: Path) -> None:
    """Layers with fewer heads, NaN heads, exact runs: gaps, not failures."""
    layers = []
    for heads, error in ((3, 0.0), (2, 0.0)):
        q, k, v = local_heads(rng, heads, n=64)
        q[0, 0, 0, 0] = np.nan
        layers.append(inspect_heads(q, k, v, Request(error), is_causal=True, index=len(layers))[1])
    plots.heat_maps(layers, "a title", 0.0, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def model() -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@needs_torch
def test_a_model_runs_on_its_own_attention(model: Any) -> None:
    """Exact: the layers see what they would see anyway, and the model comes back as it was."""
    import torch

    ids = torch.randint(0, VOCABULARY, (70,), generator=torch.Generator().manual_seed(1))
    before = model.config._attn_implementation
    seen: list[int] = []
    layers = inspect_model(model, ids, Request(truth="exact"), progress=lambda layer: seen.append(layer.index))
    assert seen == [0, 1, 2]
    assert all(layer.causal and layer.tokens == layer.keys == 70 and layer.forms.shape == (4,) for layer in layers)
    assert all((layer.true_error == 0).all() for layer in layers)
    assert model.config._attn_implementation == before
    captured: list[Any] = []
    hook = model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda *a: captured.append(a[2]))
    try:
        inspect_model(model, ids, Request())
        with torch.no_grad():
            model(ids[None])
    finally:
        hook.remove()
    torch.testing.assert_close(captured[0], captured[1], rtol=1e-3, atol=1e-5)


@needs_torch
def test_an_encoder_is_not_causal() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    layers = inspect_model(transformers.BertModel(config).eval(), torch.arange(50), Request())
    assert [layer.causal for layer in layers] == [False, False]


@needs_torch
def test_a_failing_model_is_left_as_it_was(model: Any) -> None:
    import torch

    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="the layer of the tile map is 7, there are 3"):
        inspect_model(model, torch.arange(9), Request(tile_map=(7, 0)))
    assert model.config._attn_implementation == before


class CharacterTokenizer:
    def __call__(self, text: str, **options: object) -> Any:
        import torch
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.tensor([[ord(c) % VOCABULARY for c in text]])})


@needs_torch
def test_model_command(model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "load_smollm2", lambda: (model, CharacterTokenizer()))
    assert main(["inspect", "--tokens", "100"]) == 0
    output = capsys.readouterr()
    assert "100 tokens of News from Nowhere (William Morris, 1890)" in output.out
    assert "12 heads: work 1.00 of dense attention, 0 ran again" in output.out
    assert "inspecting" in output.err
    assert main(["inspect", "--tokens", "100000"]) == 2
    assert "takes at most 2048" in capsys.readouterr().err


@needs_torch
def test_models_on_disk(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from adaattn.models import load_directory

    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: CharacterTokenizer())
    loaded, _ = load_directory(tmp_path)
    assert loaded.config.num_hidden_layers == 3
    assert not loaded.training
