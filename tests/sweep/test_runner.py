"""All tasks of a sweep, trained by a program that stands for train.py."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import ROOT

from lockstep.files import read_json
from lockstep.sweep.file import Sweep, read_sweep
from lockstep.sweep.results import TaskRun, plan_runs
from lockstep.sweep.runner import Runner

STAND_IN = Path(__file__).with_name("stand_in.py")
EPOCHS = "0.5,0.6,0.7"


def sweep_of(folder: Path, rates: Sequence[float], more: str = "") -> tuple[Sweep, list[TaskRun]]:
    path = folder / "rates.yaml"
    path.write_text(f"method: grid\nparameters: {{optim.lr: {{values: {list(rates)}}}}}\n{more}")
    sweep = read_sweep(path)
    return sweep, plan_runs(sweep, [f"--run.root={folder / 'runs'}"])


def standing_in(started: list[int] | None = None, **behaviours: tuple[str, str]) -> Callable[[TaskRun], list[str]]:
    """The command of each task; `_2=("fail", "0.1")` is for task 2, the others finish."""

    def command(run: TaskRun) -> list[str]:
        if started is not None:
            started.append(run.index)
        behaviour, accuracies = behaviours.get(f"_{run.index}", ("finish", EPOCHS))
        return [sys.executable, str(STAND_IN), str(run.path), behaviour, accuracies]

    return command


def times_of(folder: Path) -> list[tuple[float, float]]:
    lines = (folder / "runs" / "times").read_text().splitlines()
    return [(float(began), float(ended)) for began, ended, _ in map(str.split, lines)]


def test_all_are_trained_and_the_same_again_trains_none(tmp_path: Path, capsys: Any) -> None:
    sweep, runs = sweep_of(tmp_path, [0.1, 0.2])
    assert Runner(sweep, runs, standing_in()).run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("[1/2] task 0: lr=0.1: val/accuracy 0.7000, test/accuracy 0.7000, ")
    (_, first_end), (second_begin, _) = times_of(tmp_path)
    assert first_end <= second_begin, "one at a time"
    assert (tmp_path / "runs" / "sweep_rates" / "task_001.log").read_text().startswith("training")
    started: list[int] = []
    assert Runner(sweep, runs, standing_in(started)).run() == 0
    assert started == [] and "2 tasks, 2 of them done before" in capsys.readouterr().out


def test_n_at_once(tmp_path: Path) -> None:
    sweep, runs = sweep_of(tmp_path, [0.1, 0.2, 0.3, 0.4])
    long = ("finish", ",".join(["0.5"] * 20))
    assert Runner(sweep, runs, standing_in(_0=long, _1=long, _2=long, _3=long), jobs=2).run() == 0
    times = times_of(tmp_path)
    most = max(sum(began <= moment < ended for began, ended in times) for moment, _ in times)
    assert most == 2


def test_failures_stop_nobody_and_are_told_at_the_end(tmp_path: Path, capsys: Any) -> None:
    sweep, runs = sweep_of(tmp_path, [0.1, 0.2, 0.3])
    runner = Runner(sweep, runs, standing_in(_1=("fail", "0")))
    assert runner.run() == 1
    (failure,) = runner.failures
    assert str(failure) == f"task 1 failed with 3: lr=0.2\n  error: no luck today\n  all of it: {runs[1].log}"
    assert "[2/3] task 1: lr=0.2: failed with 3: error: no luck today" in capsys.readouterr().out
    assert [run.is_finished for run in runs] == [True, False, True]
    started: list[int] = []
    assert Runner(sweep, runs, standing_in(started)).run() == 0 and started == [1]


def test_a_program_that_trains_nothing_has_failed(tmp_path: Path) -> None:
    sweep, runs = sweep_of(tmp_path, [0.1])
    runner = Runner(sweep, runs, lambda run: [sys.executable, "-c", ""])
    assert runner.run() == 1 and "(it said nothing)" in str(runner.failures[0])


def test_a_task_that_somebody_stops_waits_and_goes_on(tmp_path: Path) -> None:
    sweep, runs = sweep_of(tmp_path, [0.1])
    long = ("finish", ",".join(["0.5"] * 100))
    threading.Timer(1.0, lambda: (runs[0].path / "stop").touch()).start()
    assert Runner(sweep, runs, standing_in(_0=long)).run() == 85
    assert Runner(sweep, runs, standing_in()).run() == 0 and runs[0].is_finished


EARLY = "metric: {name: val/accuracy, goal: maximize}\nearly_terminate: {type: hyperband, min_iter: 2, eta: 2}\n"


def test_a_run_that_fails_a_bracket_is_stopped_for_good(tmp_path: Path, capsys: Any) -> None:
    """At bracket 2 the values are 0.9, 0.8 and 0.3: the threshold of eta 2 is 0.8."""
    sweep, runs = sweep_of(tmp_path, [0.1, 0.2, 0.3], EARLY)
    bad = ("finish", ",".join(["0.3"] * 200))
    command = standing_in(_0=("finish", "0.9,0.9"), _1=("finish", "0.8,0.8"), _2=bad)
    assert Runner(sweep, runs, command).run() == 0
    assert [run.is_finished for run in runs] == [True, True, False]
    assert "task 2: lr=0.3: stopped early at bracket 2, val/accuracy 0.3000" in capsys.readouterr().out
    assert read_json(runs[2].log.parent / "stopped.json").keys() == {runs[2].path.name}
    started: list[int] = []
    assert Runner(sweep, runs, standing_in(started)).run() == 0 and started == []


def test_a_run_that_was_over_before_it_saw_the_stop_is_finished(tmp_path: Path) -> None:
    sweep, runs = sweep_of(tmp_path, [0.1, 0.2, 0.3], EARLY)
    script = STAND_IN.read_text().replace('(folder / "stop").exists()', "False")
    command = standing_in(_0=("finish", "0.9,0.9"), _1=("finish", "0.8,0.8"), _2=("finish", ",".join(["0.3"] * 50)))
    runner = Runner(sweep, runs, lambda run: [sys.executable, "-c", script, *command(run)[2:]])
    assert runner.run() == 0 and all(run.is_finished for run in runs) and runs[2] not in runner.stops
    assert not (runs[2].path / "stop").exists()


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
from test_runner import sweep_of, standing_in
from lockstep.errors import one_line_errors
from lockstep.sweep.runner import Runner
sweep, runs = sweep_of(Path({folder!r}), [0.1, 0.2, 0.3])
long = ({behaviour!r}, ",".join(["0.5"] * 400))
with one_line_errors():
    sys.exit(Runner(sweep, runs, standing_in(_0=long, _1=long, _2=long), jobs=2).run())
"""


def started_sweep(folder: Path, behaviour: str = "finish") -> subprocess.Popen[str]:
    """A program that trains three long tasks, two of which have begun."""
    here = Path(__file__).parent
    program = PROGRAM.format(tests=str(here.parent), here=str(here), folder=str(folder), behaviour=behaviour)
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings
    )
    deadline = time.monotonic() + 60
    while len(list((folder / "runs").glob("*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


def nobody_is_left(children: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(children, timeout=20)
    return not alive


def test_a_signal_lets_the_tasks_save_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process = started_sweep(tmp_path)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 85, err
    assert "SIGTERM: 2 running tasks save and stop" in out and nobody_is_left(children)
    assert out.count("stopped; the same command continues") == 2
    sweep, runs = sweep_of(tmp_path, [0.1, 0.2, 0.3])
    assert [(run.path / "preempted").exists() for run in runs] == [True, True, False]
    before = len((runs[0].path / "metrics.jsonl").read_text().splitlines())
    assert 0 < before < 400
    assert Runner(sweep, runs, standing_in(_0=("finish", ",".join(["0.5"] * (before + 2))))).run() == 0
    assert len((runs[0].path / "metrics.jsonl").read_text().splitlines()) == before + 2, "it went on"


@pytest.mark.slow
def test_a_second_interrupt_waits_for_nobody(tmp_path: Path) -> None:
    process = started_sweep(tmp_path, "deaf")
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    time.sleep(3.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert "SIGINT: 2 running tasks save and stop" in out
    assert process.returncode == 130 and err == "interrupted\n" and nobody_is_left(children)


@pytest.mark.slow
def test_tasks_save_and_end_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    process = started_sweep(tmp_path)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=30)
    assert nobody_is_left(children)
    _, runs = sweep_of(tmp_path, [0.1, 0.2, 0.3])
    assert [(run.path / "preempted").exists() for run in runs] == [True, True, False]
