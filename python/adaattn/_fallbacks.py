"""Counts of the calls that AdaAttn took over and of those it handed back to PyTorch, with the reason of each."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

_logger = logging.getLogger("adaattn")


@dataclass(frozen=True)
class HookStatistics:
    """What happened to the attention calls that AdaAttn saw since the counts were last reset.

    taken: calls that an AdaAttn kernel carried out (under torch.compile: calls traced, not runs of the compiled code).
    returned: calls handed back to PyTorch, by reason.
    """

    taken: int
    returned: dict[str, int]

    @property
    def total(self) -> int:
        return self.taken + sum(self.returned.values())

    def to_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "returned": dict(self.returned)}


class CallLog:
    """Counts calls from any number of threads; logs the first call of each reason as a warning, the others at debug
    level."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0
        self._returned: Counter[str] = Counter()

    def count_taken(self) -> None:
        with self._lock:
            self._taken += 1

    def count_returned(self, reason: str) -> None:
        with self._lock:
            self._returned[reason] += 1
            first = self._returned[reason] == 1
        level = logging.WARNING if first else logging.DEBUG
        _logger.log(level, "attention call handed back to PyTorch: %s", reason)

    def statistics(self, *, reset: bool = False) -> HookStatistics:
        with self._lock:
            snapshot = HookStatistics(self._taken, dict(self._returned))
            if reset:
                self._taken = 0
                self._returned.clear()
        return snapshot


calls = CallLog()
"""The process-wide log that the SDPA hook and the transformers integration write to."""
