"""Processes that wait for one another at the start, and name those that do not come."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import finish, free_port, start

pytestmark = pytest.mark.launch
MEET = """
import os
import sys
from lockstep.errors import UserError
from lockstep.launch.rendezvous import meet
try:
    store = meet(int(sys.argv[1]))
    print(store is not None)
    # Rank 0 holds the store: it stays until every other rank has its answer.
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"met/{rank}", "")
    if rank == 0:
        store.wait([f"met/{other}" for other in range(processes)])
except UserError as absence:
    print(absence)
"""


def meeting(place: Path, ranks: list[int], processes: int, seconds: int, **more: str) -> list[str]:
    """What those that come print, in their order."""
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", MEET, str(seconds)]
    started: list[subprocess.Popen[str]] = [start(command, place, RANK=str(rank), **shared, **more) for rank in ranks]
    return [finish(process, 60).stdout.strip() for process in started]


@pytest.mark.slow
def test_all_come(tmp_path: Path) -> None:
    assert meeting(tmp_path, [0, 1, 2], 3, 60) == ["True"] * 3


@pytest.mark.slow
def test_those_that_do_not_come_are_named(tmp_path: Path) -> None:
    lines = meeting(tmp_path, [0, 1], 4, 3, LOCAL_WORLD_SIZE="2")
    said = (
        r"ranks 2, 3 of 4 \(on node 1 of 2\) did not come within 3 s .--runtime.rendezvous_seconds.; 2 came, from \S+"
    )
    assert any(re.fullmatch(said, line) for line in lines), lines


@pytest.mark.slow
def test_a_first_process_that_does_not_come_is_named(tmp_path: Path) -> None:
    (line,) = meeting(tmp_path, [1], 2, 1)
    assert re.match(r"rank 1 \(\S+\) waited 1 s .* for rank 0, which should be at 127.0.0.1:\d+", line), line
