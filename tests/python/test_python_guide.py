"""Runs the examples of docs/python.md, in order, in one namespace."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import adaattn

GUIDE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    adaattn.hook_statistics(reset=True)
    yield
    adaattn.disable()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) >= 7
    names: dict[str, Any] = {}
    for number, example in enumerate(EXAMPLES):
        exec(compile(example, f"{GUIDE.name}, example {number}", "exec"), names)
    assert names["tokens"].shape == (1, 7)
    # The guide quotes what is printed here.
    quoted = re.search(r"# (HookStatistics\(.*\))$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert quoted is not None
    assert quoted.group(1) in capsys.readouterr().out


def test_every_public_name_is_there() -> None:
    for name in adaattn.__all__:
        assert getattr(adaattn, name) is not None
        assert name in dir(adaattn)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = adaattn.no_such_name


def test_importing_needs_no_torch() -> None:
    """Neither quick imports nor NumPy users pay for torch; what needs it says so."""
    program = """
import sys
import adaattn
assert "torch" not in sys.modules
sys.modules["torch"] = None  # as if it were not installed
try:
    adaattn.enable()
except ImportError as error:
    assert "adaattn.enable needs PyTorch: pip install 'adaattn[torch]'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)
