"""The command line: adaattn COMMAND. Each module in COMMANDS is one command and exposes add_parser(subparsers), which
sets the default `run`, a function from parsed arguments to the exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from adaattn import __version__

COMMANDS = ("info", "verify", "eval", "inspect", "gradients", "bench")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="adaattn",
        description="AdaAttn: attention with an error budget. Every command has --json for programs.",
    )
    parser.add_argument("--version", action="version", version=f"adaattn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"adaattn.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0 for success, 1 for a failed check, 2 for what could not run."""
    args = make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(
            f"adaattn {args.command}: needs the Python package {error.name}, see the extras of adaattn", file=sys.stderr
        )
        return 2
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        print(f"adaattn {args.command}: {error}", file=sys.stderr)
        return 2
    return code
