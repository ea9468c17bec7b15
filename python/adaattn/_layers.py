"""Which torch module each thread is inside of now, so that the SDPA hook can tell one layer's calls from another's."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module


class _Stack(threading.local):
    def __init__(self) -> None:
        self.modules: list[nn.Module] = []


class LayerTracker:
    """Hooks on every module's forward while it is on; it costs two or three microseconds per module call.

    Compiled code is not tracked: there the current layer is what was current outside of it.
    """

    def __init__(self) -> None:
        self._stack = _Stack()
        self._handles: list[Any] = []

    def start(self) -> None:
        """Does nothing if it is on."""
        if not self._handles:
            self._handles = [
                _module.register_module_forward_pre_hook(self._enter),
                _module.register_module_forward_hook(self._leave, always_call=True),
            ]

    def stop(self) -> None:
        """Takes the hooks away; forward passes that are under way in other threads are no longer told apart."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stack = _Stack()

    @property
    def current(self) -> nn.Module | None:
        """The innermost module whose forward this thread is in, None outside of all."""
        modules = self._stack.modules
        return modules[-1] if modules else None

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._stack.modules.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        modules = self._stack.modules
        # A module that was entered before the tracker began leaves without having entered.
        while modules and module in modules:
            if modules.pop() is module:
                break
