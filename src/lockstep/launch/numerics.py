"""What the bits of a result depend on, beside settings and data."""

import os
from typing import Any

import torch

from lockstep.launch.accelerator import Launch
from lockstep.launch.machine import cpu_model
from lockstep.settings.config import RuntimeConfig

_CHOOSING_KERNELS = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
)
"""Variables of the environment by which libraries choose other kernels"""


def sums_in_order(config: RuntimeConfig) -> bool:
    """Whether gradients are summed in the one order, so that the number of processes leaves no trace."""
    return config.exact and not config.compress_gradients


def numerics_of(config: RuntimeConfig, launch: Launch) -> dict[str, Any]:
    """All that the bits depend on, as environment.json has it.

    On a CPU the number of threads is among it: kernels divide their sums among them (float64: 6e-14 apart after one
    step of one or two threads).
    """
    on_gpu = launch.device.type == "cuda"
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if on_gpu else {}
    return {
        "device": torch.cuda.get_device_name(launch.device) if on_gpu else _cpu(config),
        "precision": launch.precision_name if config.dtype == "float32" else "fp64",
        **({} if on_gpu else {"threads": torch.get_num_threads()}),
        "torch": torch.__version__,
        **libraries,
        **{name: os.environ[name] for name in _CHOOSING_KERNELS if name in os.environ},
        "exact": sums_in_order(config),
        "compile": config.compile if config.compile != "off" else False,
        **({"fsdp": True} if launch.fsdp else {}),  # which has a memory layout of its own
    }


def _cpu(config: RuntimeConfig) -> str:
    return "any x86-64 CPU with AVX2" if config.portable else cpu_model()


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two numerics, `threads 2 -> 1, exact True -> False`; empty if nothing does."""
    keys = dict.fromkeys([*before, *now])
    return ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key))


def describe_exactness(config: RuntimeConfig, launch: Launch) -> str | None:
    """One line if these settings leave the promise of the same bits on any number of processes."""
    causes = {
        "--runtime.exact=false": not config.exact,
        "--runtime.compress_gradients": config.compress_gradients,
        "--runtime.sync_batchnorm": config.sync_batchnorm,
        f"--runtime.compile={config.compile}": config.compile != "off",
    }
    found = [cause for cause, applies in causes.items() if applies]
    if not found:
        return None
    return (
        f"note: with {' and '.join(found)} another number of processes does not give the same bits (docs/sameness.md)"
    )
