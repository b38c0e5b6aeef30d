"""The program that trains a task, and its share of the cores."""

import sys
from pathlib import Path

import pytest
from folders import lines, write_run

from lockstep.sweep.command import command_of
from lockstep.sweep.file import Sweep, read_sweep
from lockstep.sweep.results import TaskRun, plan_runs


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Sweep, TaskRun]:
    monkeypatch.setattr("lockstep.sweep.command.owned_cores", lambda: 8)
    path = tmp_path / "mine.yaml"
    path.write_text("method: grid\nparameters: {optim.lr: {values: [0.1, 0.2]}}")
    sweep = read_sweep(path)
    return sweep, plan_runs(sweep, [f"--run.root={tmp_path / 'runs'}"])[1]


def test_one_at_a_time_takes_all_cores(task: tuple[Sweep, TaskRun]) -> None:
    sweep, run = task
    expected = [sys.executable, "-m", "lockstep", "sweep", "run", str(sweep.path), "1", "--train.epochs=3"]
    assert command_of(sweep, run, ["--train.epochs=3"], jobs=1, processes=1) == expected


def test_several_at_once_share_them(task: tuple[Sweep, TaskRun]) -> None:
    sweep, run = task
    assert command_of(sweep, run, [], jobs=3, processes=1)[-1] == "--runtime.threads=2"
    assert command_of(sweep, run, [], jobs=2, processes=2)[-1] == "--runtime.threads=2"
    assert command_of(sweep, run, [], jobs=20, processes=1)[-1] == "--runtime.threads=1"


def test_a_run_keeps_the_threads_it_began_with(task: tuple[Sweep, TaskRun]) -> None:
    sweep, run = task
    write_run(run.path, {"state": "preempted", "threads": 8}, lines([0.5]), optim__lr=0.2)
    assert command_of(sweep, run, [], jobs=4, processes=1)[-1] == "1"


def test_threads_of_the_settings_win(task: tuple[Sweep, TaskRun]) -> None:
    sweep, _ = task
    run = plan_runs(sweep, ["--runtime.threads=5"])[1]
    assert command_of(sweep, run, ["--runtime.threads=5"], jobs=4, processes=1)[-1] == "--runtime.threads=5"


def test_several_processes_are_launched_at_a_port_of_their_own(task: tuple[Sweep, TaskRun]) -> None:
    sweep, run = task
    command, other = (command_of(sweep, run, [], jobs=1, processes=2) for _ in range(2))
    place = command.index("--num_processes")
    assert command[2] == "accelerate.commands.launch" and command[place + 1] == "2" and Path(command[4]).is_file()
    assert command[place + 4 :] == ["-m", "lockstep", "sweep", "run", str(sweep.path), "1"]
    assert command[place + 3].isdigit() and command[place + 3] != other[place + 3]
