"""CPU threads of a process: as many as it owns cores, or as its run began with."""

import contextlib
import os
from pathlib import Path

import torch

from lockstep.launch.machine import local_processes
from lockstep.settings.config import RuntimeConfig

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def owned_cores() -> int:
    """Cores of this process: its share of those that it and its neighbours may use."""
    return max(1, allowed_cores() // local_processes())


def allowed_cores() -> int:
    """Cores of all processes of this launch on this machine; the word of SLURM or a container counts where none binds.

    All of them are this process's while the others wait for it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # else: macOS
    with contextlib.suppress(ValueError):  # of garbage
        cores = max(1, min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores))))
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, _CPU_QUOTA.read_text().split())
        cores = max(1, min(cores, quota // period))
    return cores


def choose_threads(config: RuntimeConfig, cores: int) -> None:
    """Let torch use the threads of the settings, or all cores, whatever the launcher has said (it says 1)."""
    torch.set_num_threads(config.threads or cores)


def keep_threads(config: RuntimeConfig, kept: int | None, cores: int, *, on_cpu: bool) -> None:
    """On a CPU, use as many threads as the run's first start, unless settings say otherwise or cores are too few.

    Another number would give other bits.
    """
    if on_cpu and config.threads is None and kept is not None and kept <= cores:
        torch.set_num_threads(kept)
