"""A bit that flips in one process's memory, by the harness that does it a hundred times in `make soak`."""

import random
from pathlib import Path

import pytest
from bit_flips import leaves_a_sound_run_alone, names_the_damaged_rank
from fork_server import ForkServer

pytestmark = pytest.mark.launch


def test_a_flipped_bit_is_named_at_the_next_line_of_the_log(server: ForkServer, tmp_path: Path) -> None:
    draws = random.Random(1)
    assert all(names_the_damaged_rank(server, tmp_path / f"flip {number}", draws) for number in range(3))
    assert not list(tmp_path.glob("flip */runs/*/checkpoints/step_*")), "nothing of it may be saved"


def test_a_sound_run_is_left_alone(server: ForkServer, tmp_path: Path) -> None:
    assert leaves_a_sound_run_alone(server, tmp_path / "sound")
