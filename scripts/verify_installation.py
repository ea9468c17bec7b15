#!/usr/bin/env python3
"""Checks an installation of adaattn, wherever pip put it: what it can use here, and that every kernel is right.

Calls what `adaattn info` and `adaattn verify` call, and needs NumPy only. Exit code 0 if all is well.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Runs both commands and returns the first exit code that is not 0."""
    try:
        from adaattn.cli import main as adaattn
    except ImportError as error:
        print(f"adaattn cannot be imported: {error}. Install it: pip install .", file=sys.stderr)
        return 2
    return adaattn(["info"]) or adaattn(["verify"])


if __name__ == "__main__":
    sys.exit(main())
