"""adaattn info: what is installed and what this machine can run."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from adaattn import _library, describe
from adaattn.cli._table import table

_PACKAGES = ("numpy", "torch", "transformers", "ml_dtypes", "matplotlib")

_DESCRIPTION = """\
Shows the versions of AdaAttn and of the packages it works with, the CPU's instruction sets, the GPUs, and the table of
kernels in the order in which they are tried: the first that takes a call runs it. For a kernel that this machine cannot
run it says why. To see which kernel takes a certain call and why others decline it, use adaattn.describe(q, k, v, ...)
in Python."""


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "info",
        help="versions, devices, instruction sets, kernels and why each is unavailable",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def collect() -> dict[str, Any]:
    """Everything that the command shows."""
    facts = describe()
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        "library": _library.library()._name,
        "python": platform.python_version(),
        "packages": packages,
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        **facts,
    }


def run(args: argparse.Namespace) -> int:
    """Prints it. Always 0."""
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(facts: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {found or 'not installed'}" for name, found in facts["packages"].items())
    gpus = ", ".join(facts["cuda_devices"]) or f"none ({facts['cuda_unavailable'] or 'no device found'})"
    kernels = [
        (
            kernel["name"],
            kernel["operation"],
            kernel["device"],
            "; ".join(kernel["unavailable"]) or "available",
            kernel["summary"],
        )
        for kernel in facts["kernels"]
    ]
    return "\n".join(
        (
            f"AdaAttn {facts['version']} ({facts['library']})",
            f"Python {facts['python']}, {packages}",
            f"CPU     {facts['machine']}, {facts['cpus']} usable, instruction sets {_sets(facts)}",
            f"GPU     {gpus}",
            "",
            table(("kernel", "operation", "device", "state", "what it is"), kernels),
        )
    )


def _sets(facts: dict[str, Any]) -> str:
    return ", ".join(facts["instruction_sets"]) or "none with a kernel"
