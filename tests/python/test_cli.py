"""The program adaattn: its commands info and verify, and how it reports errors."""

import argparse
import json
import subprocess
import sys

import adaattn
import numpy as np
import pytest
from adaattn import cli
from adaattn._tolerance import UNIT_ROUNDOFF, backward_tolerance, forward_tolerance
from adaattn.cli import _check, info, verify
from adaattn.cli._cases import CASES, Case, make_arrays
from adaattn.cli._check import relative_error
from adaattn.cli._table import table

FEW = tuple(case for case in CASES if case.name in ("D = 1", "no keys", "one query, key lengths", "bool mask"))


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(verify, "CASES", FEW)


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for kernel in adaattn.describe()["kernels"]:
        assert kernel["name"] in text
    assert np.__version__ in text
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["kernels"] == adaattn.describe()["kernels"]


def test_info_says_why_a_kernel_is_unavailable(capsys, monkeypatch):
    facts = adaattn.describe()
    facts["kernels"][0]["unavailable"] = ["the moon is full"]
    facts["cuda_devices"] = ["one GPU"]
    monkeypatch.setattr(info, "describe", lambda: facts)
    monkeypatch.setattr(info, "_PACKAGES", ("no_such_package",))
    cli.main(["info"])
    text = capsys.readouterr().out
    assert "the moon is full" in text
    assert "one GPU" in text
    assert "no_such_package not installed" in text


def test_verify_passes(capsys):
    assert cli.main(["verify"]) == 0
    text = capsys.readouterr().out
    assert " 0 failed" in text
    assert "FAILED" not in text


@pytest.mark.usefixtures("few_cases")
class TestVerify:
    def test_json(self, capsys):
        assert cli.main(["verify", "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        kernels = [kernel for kernel in adaattn.describe()["kernels"] if not kernel["unavailable"]]
        assert {entry["kernel"] for entry in summary["results"]} >= {kernel["name"] for kernel in kernels}
        assert summary["failed"] == 0
        compared = [entry for entry in summary["results"] if entry["passed"] is not None]
        assert len(compared) == summary["passed"]
        assert all(entry["reason"] for entry in summary["results"] if entry["passed"] is None)

    def test_verbose(self, capsys):
        assert cli.main(["verify", "--verbose", "--kernel", "reference_fp64", "--seed", "3"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum("reference_fp64" in line for line in lines) == 2 * len(FEW)

    def test_a_wrong_kernel_fails(self, capsys, monkeypatch):
        right = adaattn.attention

        def wrong(*args, **keywords):
            out, lse = right(*args, **keywords)
            return out * np.float32(1.0001), lse  # a relative error of 1e-4: FP16 arithmetic, say

        monkeypatch.setattr(adaattn, "attention", wrong)
        assert cli.main(["verify"]) == 1
        assert "FAILED" in capsys.readouterr().out
        assert cli.main(["verify", "--json", "--kernel", "reference_fp64"]) == 1
        output = capsys.readouterr().out
        failed = [entry for entry in json.loads(output)["results"] if entry["passed"] is False]
        assert {entry["operation"] for entry in failed} == {"forward"}

    def test_a_wrong_lse_fails(self, capsys, monkeypatch):
        right = adaattn.attention

        def wrong(*args, **keywords):
            out, lse = right(*args, **keywords)
            return out, np.where(lse == -np.inf, np.float32(-1e30), lse)

        monkeypatch.setattr(adaattn, "attention", wrong)
        assert cli.main(["verify", "--kernel", "reference_fp64", "--json"]) == 1
        assert "Infinity" not in capsys.readouterr().out  # which is no JSON

    def test_wrong_gradients_fail(self, capsys, monkeypatch):
        from adaattn import _numpy_calls

        right = _numpy_calls.backward
        monkeypatch.setattr(_numpy_calls, "backward", lambda *args: tuple(-x for x in right(*args)))
        assert cli.main(["verify", "--kernel", "reference_fp64"]) == 1

    def test_nothing_to_verify_is_no_success(self, capsys, monkeypatch):
        kernel = {"name": "far", "operation": "forward", "device": "cuda", "unavailable": ["no device"]}
        monkeypatch.setattr(verify, "describe", lambda: {"kernels": [kernel]})
        assert cli.main(["verify"]) == 1
        assert "no device" in capsys.readouterr().out

    def test_progress_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert cli.main(["verify", "--kernel", "reference_fp64"]) == 0
        assert f"1 of {len(FEW)}" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--kernel", "none"], ["--seed", "-1"]])
    def test_bad_arguments(self, arguments, capsys):
        assert cli.main(["verify", *arguments]) == 2
        assert arguments[0] in capsys.readouterr().err


class TestCheck:
    def test_torch_tensors(self, monkeypatch):
        """On GPUs the check goes through torch; here with torch on the CPU."""
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(
            _check, "_converter", lambda dtype, device: lambda x: torch.from_numpy(x).to(getattr(torch, dtype))
        )
        for case in (Case("plain", q=(1, 2, 9, 8), keys=(2, 9)), Case("mask", mask="bool", dtype="bfloat16")):
            for operation in ("forward", "backward"):
                kernel = {"name": "reference_fp64", "operation": operation, "device": "cpu", "unavailable": []}
                assert _check.check(case, make_arrays(case, 0), kernel).passed

    def test_missing_packages_are_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        monkeypatch.setitem(sys.modules, "torch", None)
        case = Case("small", q=(1, 1, 2, 2), keys=(1, 2), dtype="bfloat16")
        kernel = {"name": "reference_fp64", "operation": "forward", "device": "cpu", "unavailable": []}
        outcome = _check.check(case, make_arrays(case, 0), kernel)
        assert outcome.passed is None
        assert outcome.reason == "needs torch"

    def test_relative_error(self):
        truth = np.ones((1, 2, 3, 4))
        assert relative_error(truth, truth) == 0
        assert relative_error(truth * np.array([1.0, 1.5])[:, None, None], truth) == 0.5  # the worst head
        assert relative_error(truth * np.nan, truth) == np.inf
        assert relative_error(truth, truth * 0) == np.inf
        assert relative_error(truth * 0, truth * 0) == 0
        assert relative_error(truth[:0], truth[:0]) == 0


def test_tolerances_tell_arithmetics_apart():
    """An FP32 kernel may not pass with the errors of TF32 or FP16 (2^-11), nor an FP16 one with those of BF16."""
    for dim, keys in ((64, 64), (256, 8192)):
        assert 2**-22 < forward_tolerance("float32", dim, keys) < UNIT_ROUNDOFF["float16"] / 10
        assert backward_tolerance("float32", dim, keys) < UNIT_ROUNDOFF["float16"] / 2
        assert forward_tolerance("float16", dim, keys) < UNIT_ROUNDOFF["bfloat16"] / 3


def test_table():
    text = table(("a", "long name"), [("x", ""), ("wide cell", "y")])
    assert text.splitlines() == ["a          long name", "---------  ---------", "x", "wide cell  y"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert len(text) > 300


def test_version_and_no_command(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert adaattn.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        cli.main([])
    assert exit_info.value.code == 2


def test_interruption(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=interrupted, command="x")
    monkeypatch.setattr(cli, "make_parser", lambda: parser)
    assert cli.main([]) == 130


def test_missing_package(monkeypatch, capsys):
    def needs_more(args):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=needs_more, command="x")
    monkeypatch.setattr(cli, "make_parser", lambda: parser)
    assert cli.main([]) == 2
    assert "needs the Python package torch" in capsys.readouterr().err


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from adaattn.cli import main; sys.exit(main(['info', '--json']))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["version"]
