"""Whole programs, started as a user would, and what they leave: shared by the tests that start some."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10-jpeg"

# A small, quick run: 5 steps an epoch on the embedded digits, nothing drawn or copied to trackers.
QUICK = (
    "--train.batch_size=256",
    "--train.micro_batch_size=64",
    "--train.epochs=2",
    "--checkpoint.every_epochs=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
    "--log.every_steps=2",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """The surroundings without what another launcher or W&B login may have left there."""
    dropped = ("ACCELERATE_", "WANDB_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "EXPECTED_WORLD_SIZE")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return {**kept, "WANDB_CONSOLE": "off", **extra}


def launch_command(processes: int, program: str) -> list[str]:
    """`accelerate launch` for some processes on this machine's CPU."""
    if processes == 1:
        options = ["--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
        return [*LAUNCHER, *options, "--dynamo_backend", "no", str(ROOT / program)]
    config = str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")
    options = ["--config_file", config, "--num_processes", str(processes), "--main_process_port", str(free_port())]
    return [*LAUNCHER, *options, str(ROOT / program)]


def start(command: list[str], cwd: Path, **extra: str) -> subprocess.Popen[str]:
    """Start a program in a process group of its own, so that all of it can be ended."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    """Wait for a started program; whatever is left of its group after the time is killed, and that is a failure."""
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"not finished after {timeout_seconds} s:\n{out[-2000:]}\n{err[-2000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launch(
    *arguments: str,
    cwd: Path,
    processes: int = 1,
    program: str = "train.py",
    timeout_seconds: float = 240,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """Run a program by `accelerate launch` to its end."""
    return finish(start([*launch_command(processes, program), *arguments], cwd, **extra), timeout_seconds)


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None, "training did not get that far"
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher, by rank."""
    children = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any(part.endswith("train.py") for part in child.cmdline()) and "accelerate" not in " ".join(child.cmdline())
    ]
    return sorted(children, key=lambda child: int(child.environ().get("RANK", 0)))
