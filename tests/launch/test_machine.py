"""Threads by the cores that a process owns, and memory that stays with it."""

import os
import subprocess
import sys
from pathlib import Path

from programs import finish, start

PROBE = """
import os, pathlib, torch
from lockstep.launch import machine
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
    machine._CPU_QUOTA = pathlib.Path("cpu.max")
    machine._CPU_QUOTA.write_text(quota)
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


PAGES = """
import resource, torch
from lockstep.settings.config import RuntimeConfig
from lockstep.launch.accelerator import build_accelerator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(6 << 20)  # 24 MiB: old versions of glibc keep blocks of up to 32
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
build_accelerator(RuntimeConfig())
faults()
print(usual, faults())
"""


def test_a_step_finds_the_memory_of_the_step_before(tmp_path: Path) -> None:
    done = finish(start([sys.executable, "-c", PAGES], tmp_path, ACCELERATE_USE_CPU="true"), 60)
    usual, kept = map(int, done.stdout.split())
    assert usual > 20 and kept < usual / 10, done.stderr
