"""The benchmark program: its cases, its statistics and what it writes. Speed itself is not tested."""

import argparse
import json
import math

import pytest

torch = pytest.importorskip("torch")

from adaattn import benchmark  # noqa: E402
from adaattn.cli import bench  # noqa: E402

TINY = [
    benchmark.Case("forward", "forward", 1, 2, 33, 33, 16, True),
    benchmark.Case("backward", "backward", 1, 2, 33, 33, 16, False),
    benchmark.Case("decode", "forward", 1, 4, 1, 64, 16, False, key_heads=2),
]


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["bench", *arguments])


def test_standard_cases_cover_the_grid():
    cases = benchmark.standard_cases()
    grid = {(c.dim, c.keys, c.causal) for c in cases if c.group == "forward"}
    assert grid == {(d, n, c) for d in (64, 128) for n in (512, 1024, 2048, 4096, 8192) for c in (False, True)}
    assert grid == {(c.dim, c.keys, c.causal) for c in cases if c.group == "backward"}


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.group)
def test_measure_times_both_sides(case):
    result = benchmark.measure(case, seconds=0.01)
    assert 0 < result.low <= result.speedup <= result.high < math.inf
    assert result.rounds >= 5


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.group)
def test_both_sides_compute_the_same(case):
    peer, ours = benchmark._calls(case)
    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-5)


def test_geometric_means_are_by_group():
    results = [
        benchmark.Result(case, speedup, speedup, speedup, 5) for case, speedup in zip(TINY, (2, 3, 5), strict=True)
    ]
    results.append(benchmark.Result(TINY[0], 8, 8, 8, 5))
    assert benchmark.geometric_means(results) == pytest.approx({"forward": 4, "backward": 3, "decode": 5})


def test_command_prints_json_and_writes_the_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "standard_cases", lambda: TINY)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:cpu:begin -->\nold\n<!-- bench:cpu:end -->\nafter\n")
    plot = tmp_path / "plot.png"
    assert bench.run(_parse("--json", "--seconds", "0.01", "--readme", str(readme), "--plot", str(plot))) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["means"]) == {"forward", "backward", "decode"}
    assert len(printed["results"]) == len(TINY)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "Geometric means" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--most-tokens", "1"], "no case is left"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.run(_parse(*arguments))


def test_missing_markers_are_named(tmp_path):
    path = tmp_path / "x.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="has no <!-- bench:cpu:begin -->"):
        bench.write_between_markers(path, "text")
