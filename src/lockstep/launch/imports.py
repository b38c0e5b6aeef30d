"""Imports that torch makes on the side, and that most runs can do without."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_COMPILER = "torch._dynamo"


class _AbsentCompiler(ModuleType):
    """Stands for torch's compiler where nothing is compiled, and gives way to it when something else is asked of it.

    Every optimizer asks it to stay out of `step` and of a few other methods, which says nothing as long as nothing is
    compiled. Importing it takes 3.7 s and 900 modules on a 2-core AMD EPYC (torch 2.15), longer than torch itself.
    """

    # What DistributedDataParallel asks for: whether the compiler should reduce gradients in its stead.
    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "no_optimization")

    @staticmethod
    def graph_break() -> None:
        """Nothing is traced: there is nothing to break."""

    @staticmethod
    def disable(function: Any, *_: Any, **__: Any) -> Any:
        """The function as it is: nobody would compile it."""
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # inspect asks every module for its __file__
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER], torch._dynamo
        return getattr(importlib.import_module(_COMPILER), name)


def leave_compiler_out() -> None:
    """Let torch's compiler be imported when something needs it, and not when an optimizer is made.

    Call it when the process group has been built, which takes the compiler for loaded from then on.
    """
    if _COMPILER not in sys.modules:
        sys.modules[_COMPILER] = torch._dynamo = _AbsentCompiler(_COMPILER)
