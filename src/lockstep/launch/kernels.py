"""Kernels that give the same bits each time, or the fastest."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lockstep.errors import UserError
from lockstep.settings.config import RuntimeConfig

_PORTABLE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
"""For torch, oneDNN and MKL, which read them when they first choose a kernel. Those that MKL has for AVX2 add up in
another order on CPUs of another maker."""


def choose_kernels(config: RuntimeConfig, *, on_cpu: bool) -> None:
    """Deterministic kernels if `exact`, else the fastest. Call it before anything is computed.

    Raises UserError if they are to be `portable`, and cannot be.
    """
    if config.portable:
        _choose_portable(on_cpu=on_cpu)
    if config.exact:
        # Read by cuBLAS when it starts; without it, matrix products may differ from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # torch.use_deterministic_algorithms does the same, and imports the compiler (3.9 s) to tell it, too.
        compiles = config.compile != "off"
        torch.use_deterministic_algorithms(True) if compiles else torch.set_deterministic_debug_mode("error")
        # It would also fill every new tensor, in case somebody reads what nobody has written. Nothing here does.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not config.exact and not on_cpu  # which picks kernels by their time
    if config.dtype == "float32" and not on_cpu:
        torch.set_float32_matmul_precision("high")


def _choose_portable(*, on_cpu: bool) -> None:
    if not on_cpu:
        raise UserError("--runtime.portable=true is for CPUs: the bits of a GPU depend on its model")
    os.environ.update(_PORTABLE)
    if (capability := torch.backends.cpu.get_cpu_capability()) != "AVX2":
        raise UserError(f"--runtime.portable=true needs an x86-64 CPU with AVX2: torch's kernels here are {capability}")


@contextmanager
def missing_kernels_explained() -> Iterator[None]:
    """Within it, an operation that torch cannot do deterministically is a UserError that names it."""
    try:
        yield
    except RuntimeError as error:
        missing = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if missing is None:
            raise
        raise UserError(
            f"{missing[1]} has no kernel here that gives the same bits each time: set --runtime.exact=false (launches "
            "are then equal to rounding), or another --model.name"
        ) from error
