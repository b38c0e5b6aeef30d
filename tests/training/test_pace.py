"""Which process is the slowest, and by how much."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from programs import read_lines

from lockstep.training.pace import Pace

CPU = torch.device("cpu")
# Becomes train.py with a process that takes long over its data.
SLOW = """
import os, runpy, sys, time
from lockstep.data.loader import TrainLoader

train, slow_rank = sys.argv.pop(1), int(sys.argv.pop(1))
batches = TrainLoader.batches


def slowly(self, *arguments):
    for batch in batches(self, *arguments):
        time.sleep(0.2 if int(os.environ["RANK"]) == slow_rank else 0)
        yield batch


TrainLoader.batches = slowly
sys.argv[0] = train
runpy.run_path(train, run_name="__main__")
"""


class Others:
    """Stands for a Launch: this process is rank 0, and these are the times of the rest."""

    def __init__(self, *seconds: float | None) -> None:
        self.seconds = seconds

    def gather(self, own: Any) -> list[Any]:
        self.own = own
        return [own, *self.seconds]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def step(pace: Pace, clock: list[float], *, own: float, blocked: float = 0.0, others: float = 0.0) -> None:
    with pace.blocked():
        clock[0] += blocked
    clock[0] += own
    pace.ready()
    clock[0] += others
    pace.exchanged()


def test_the_wait_for_others_is_added_up(clock: list[float]) -> None:
    pace = Pace(CPU)
    pace.exchanged()
    before = pace.waited_seconds
    step(pace, clock, own=2.0, blocked=1.0, others=3.0)
    step(pace, clock, own=2.0, others=0.5)
    assert pace.waited_seconds - before == 4.5


def test_own_time_is_without_that_of_waiting(clock: list[float]) -> None:
    pace, launch = Pace(CPU), Others(3.0)
    step(pace, clock, own=50.0)  # nothing is known of when the first one began
    for _ in range(4):
        step(pace, clock, own=1.0, blocked=0.5, others=2.0)
    assert pace.read(launch) == {"straggler": 1.5, "straggler_rank": 1}  # type: ignore[arg-type]
    assert launch.own == pytest.approx(1.0)
    step(pace, clock, own=5.0)
    assert pace.read(launch) == {"straggler": 1.25, "straggler_rank": 0}  # type: ignore[arg-type]


def test_a_validation_is_left_out(clock: list[float]) -> None:
    pace, launch = Pace(CPU), Others(1.0)
    step(pace, clock, own=1.0)
    clock[0] += 100
    pace.restart()
    step(pace, clock, own=1.0)
    step(pace, clock, own=1.0)
    pace.read(launch)  # type: ignore[arg-type]
    assert launch.own == pytest.approx(1.0)


@pytest.mark.parametrize("others", [(), (None,), (1.0, None)])
def test_nothing_is_said_where_nothing_was_measured(others: tuple[float | None, ...], clock: list[float]) -> None:
    pace = Pace(CPU)
    step(pace, clock, own=1.0)
    step(pace, clock, own=1.0)
    assert pace.read(Others(*others)) == {}  # type: ignore[arg-type]


@pytest.mark.launch
@pytest.mark.parametrize("settings", [(), pytest.param(("--runtime.exact=false",), marks=pytest.mark.slow)])
def test_the_log_names_the_slow_process(settings: tuple[str, ...], server: ForkServer, tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(SLOW)
    train = str(Path(__file__).resolve().parents[2] / "train.py")
    arguments = ("--model.name=tiny_cnn", "--train.batch_size=64", "--train.micro_batch_size=16", "--run.name=x")
    arguments += ("--train.max_steps=6", "--log.every_steps=3", "--log.wandb=disabled", "--log.tensorboard=false")
    arguments += ("--log.figures=false", "--runtime.threads=1", f"--data.cache_dir={tmp_path / 'cache'}")
    server.run(2, tmp_path, train, "1", *arguments, *settings, program=program)
    lines = [line for line in read_lines(tmp_path / "runs" / "x") if line["split"] == "train"]
    assert len(lines) == 2
    for line in lines:  # 0.4 s more a step than the other, whose own work takes some hundredths
        assert line["straggler_rank"] == 1 and 1.3 < line["straggler"] <= 2.0, line
