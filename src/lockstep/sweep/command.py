"""The program that trains a task of a sweep in a process of its own."""

import socket
import sys
from collections.abc import Sequence

import torch

from lockstep.launch.threads import owned_cores
from lockstep.settings.cli import RECIPES
from lockstep.sweep.file import Sweep
from lockstep.sweep.results import TaskRun

_LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]  # by its module, which starts 5 s sooner


def command_of(sweep: Sweep, run: TaskRun, more: Sequence[str], jobs: int, processes: int) -> list[str]:
    """`python -m lockstep sweep run FILE INDEX ...`, under `accelerate launch` where a task has several processes.

    Tasks that train at the same time share the machine's cores. A run that has begun is left its threads, which its
    bits depend on, and so is one whose settings name a number.
    """
    task = ["-m", "lockstep", "sweep", "run", str(sweep.path), str(run.index), *more]
    if jobs > 1 and run.config.runtime.threads is None and not run.summary.get("threads"):
        task.append(f"--runtime.threads={max(1, owned_cores() // (jobs * processes))}")
    return [sys.executable, *task] if processes == 1 else [*_launcher(processes), *task]


def _launcher(processes: int) -> list[str]:
    shape = "ddp_2gpu.yaml" if torch.cuda.is_available() else "cpu_2proc.yaml"
    config = RECIPES.parent / "accelerate_configs" / shape
    with socket.socket() as probe:  # tasks at the same time must not meet at one port
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", port]
    return [*_LAUNCHER, *options]
