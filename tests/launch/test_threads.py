"""Threads by the cores that a process owns, and for a run's whole life."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lockstep.launch.threads import allowed_cores, keep_threads, owned_cores
from lockstep.settings.config import RuntimeConfig

PROBE = """
import os, pathlib, torch
from lockstep.launch import threads
from lockstep.settings.config import RuntimeConfig
from lockstep.launch.accelerator import build_accelerator
assert torch.get_num_threads() == 1, "the environment was not heard"
owned = len(os.sched_getaffinity(0))
print(owned, build_accelerator(RuntimeConfig())[1].cores, torch.get_num_threads())
print(build_accelerator(RuntimeConfig(threads=3))[1].cores, torch.get_num_threads())
os.environ["LOCAL_WORLD_SIZE"] = "2"
print(build_accelerator(RuntimeConfig())[1].cores, torch.get_num_threads())
os.environ["LOCAL_WORLD_SIZE"] = str(2 * owned)
print(build_accelerator(RuntimeConfig())[1].cores, torch.get_num_threads())
os.environ.update(LOCAL_WORLD_SIZE="1", SLURM_CPUS_PER_TASK="1")
print(build_accelerator(RuntimeConfig())[1].cores, torch.get_num_threads())
del os.environ["SLURM_CPUS_PER_TASK"]
for quota in ("150000 100000", "50000 100000", "max 100000"):
    threads._CPU_QUOTA = pathlib.Path("cpu.max")
    threads._CPU_QUOTA.write_text(quota)
    print(build_accelerator(RuntimeConfig())[1].cores, torch.get_num_threads())
"""


def test_threads_are_the_cores_that_a_process_owns(all_cores: set[int], tmp_path: Path) -> None:
    """Although the launcher says one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, explicit, halved, crowded, given, *quotas = (
        list(map(int, line.split())) for line in done.stdout.splitlines()
    )
    owned = len(all_cores)
    assert first == [owned] * 3
    assert explicit == [owned, 3]
    assert halved == [max(1, owned // 2)] * 2
    assert crowded == [1, 1]
    assert given == [1, 1], "SLURM gave one core, and did not bind the process to it"
    assert quotas == [[1, 1], [1, 1], [owned, owned]], "a container of 1.5 or 0.5 cores, and one without a limit"


def test_a_process_whose_neighbours_wait_may_use_their_cores(
    all_cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * len(all_cores)))
    assert (allowed_cores(), owned_cores()) == (len(all_cores), 1)


def test_without_affinity_all_cores_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert allowed_cores() == 1


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("config", "kept", "cores", "expected"),
    [
        (RuntimeConfig(), 2, 4, 2),
        (RuntimeConfig(), None, 4, 3),  # a first start
        (RuntimeConfig(), 8, 4, 3),  # more than this machine has
        (RuntimeConfig(threads=3), 2, 4, 3),
    ],
)
def test_a_run_keeps_its_threads(config: RuntimeConfig, kept: int | None, cores: int, expected: int) -> None:
    torch.set_num_threads(3)
    keep_threads(config, kept, cores, on_cpu=True)
    assert torch.get_num_threads() == expected
    keep_threads(RuntimeConfig(), 1, cores, on_cpu=False)
    assert torch.get_num_threads() == expected
