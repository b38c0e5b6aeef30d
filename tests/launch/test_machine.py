"""Memory that stays with a process."""

import sys
from pathlib import Path

from programs import finish, start

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
