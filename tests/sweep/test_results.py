"""The runs of a sweep's tasks, their table and their figure."""

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from folders import finished, lines, write_run

from lockstep.errors import UserError
from lockstep.sweep.file import Metric, Sweep, read_sweep
from lockstep.sweep.results import (
    EarlyStops,
    Result,
    TaskRun,
    as_table,
    draw_comparison,
    folder_of,
    plan_runs,
    ranked,
    read_result,
    write_table,
)


def planned(folder: Path, parameters: str, *more: str) -> tuple[Sweep, list[TaskRun]]:
    path = folder / "mine.yaml"
    path.write_text(f"method: grid\nparameters: {parameters}\n")
    sweep = read_sweep(path)
    return sweep, plan_runs(sweep, [f"--run.root={folder / 'runs'}", *more])


def test_each_task_has_a_run_folder_and_a_log(tmp_path: Path) -> None:
    sweep, runs = planned(tmp_path, "{optim.lr: {values: [0.1, 0.2]}, model.hidden: {value: [64]}}")
    assert [run.label for run in runs] == ["lr=0.1 hidden=[64]", "lr=0.2 hidden=[64]"]
    assert runs[1].log == tmp_path / "runs" / "sweep_mine" / "task_001.log"
    assert folder_of(sweep, runs[0].config) == runs[0].log.parent and runs[0].path.parent == tmp_path / "runs"
    assert runs[0].path != runs[1].path and list(tmp_path.glob("runs")) == []


def test_labels_keep_the_section_where_keys_are_alike(tmp_path: Path) -> None:
    _, (run,) = planned(tmp_path, "{optim.name: {value: sgd}, schedule.name: {value: cosine}}")
    assert run.label == "optim.name=sgd schedule.name=cosine"


def test_mistakes_name_the_task_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task 1 of .*mine.yaml: --optim.lr=-1.0 must be positive"):
        planned(tmp_path, "{optim.lr: {values: [1, -1]}}")
    with pytest.raises(UserError, match="unknown setting --optim.lrr"):
        planned(tmp_path, "{optim.lr: {values: [1]}}", "--optim.lrr=1")
    with pytest.raises(UserError, match="tasks 0 and 1 are one run"):
        planned(tmp_path, "{optim: {values: [{lr: 0.1}, {lr: 0.1, momentum: 0}]}}", "--optim.name=sgd")


def written_runs(folder: Path) -> tuple[Sweep, list[TaskRun]]:
    """Four tasks: 0.7, 0.9 stopped early, none yet, 0.9."""
    sweep, runs = planned(folder, "{optim.lr: {values: [0.1, 0.2, 0.3, 0.4]}}")
    write_run(runs[0].path, finished(0.65), lines([0.6, 0.7]), optim__lr=0.1)
    write_run(runs[1].path, {"state": "preempted"}, lines([0.9]), optim__lr=0.2)
    write_run(runs[3].path, finished(0.85), lines([0.9, 0.8]), optim__lr=0.4)
    EarlyStops(folder_of(sweep, runs[0].config)).add(runs[1], 1)
    return sweep, runs


def test_the_table_has_the_best_first_and_what_is_missing_last(tmp_path: Path) -> None:
    sweep, runs = written_runs(tmp_path)
    stops = EarlyStops(folder_of(sweep, runs[0].config))
    results = ranked([read_result(run, sweep.metric, stops) for run in runs], sweep.metric)
    assert [result.run.index for result in results] == [1, 3, 0, 2]
    assert [result.state for result in results] == ["stopped early", "finished", "finished", "not begun"]
    assert as_table(results, sweep.metric).splitlines()[1:3] == [
        "   1          0.9000              -        -  lr=0.2 (stopped early)",
        "   3          0.9000         0.8500     1800  lr=0.4",
    ]
    write_table(results, sweep.metric, tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert rows[1] == {
        **{"task": "3", "run": runs[3].path.name, "state": "finished", "val/accuracy": "0.9"},
        **{"test/accuracy": "0.85", "wall_seconds": "1800.0", "optim.lr": "0.4"},
    }


def test_what_is_minimized_has_the_lowest_first(tmp_path: Path) -> None:
    _, (run,) = planned(tmp_path, "{optim.lr: {value: 0.1}}")
    results = [Result(run, "finished", value, 0.0, 0.0) for value in (0.3, math.nan, 0.1)]
    assert [result.value for result in ranked(results, Metric("loss", maximize=False))][:2] == [0.1, 0.3]
    assert Metric("loss", maximize=False).best([0.3, math.nan, 0.2]) == 0.2 and math.isnan(Metric().best([]))


def test_the_figure_has_a_curve_for_each_task_that_has_begun(tmp_path: Path, monkeypatch: Any) -> None:
    _, runs = written_runs(tmp_path)
    drawn: list[str] = []

    def plot(groups: Any, path: Path) -> None:
        drawn.extend(group.label for group in groups)

    monkeypatch.setattr("lockstep.sweep.results.plot_comparison", plot)
    assert draw_comparison(runs, tmp_path / "comparison.png")
    assert drawn == ["lr=0.1", "lr=0.2", "lr=0.4"]
    assert not draw_comparison(runs[2:3], tmp_path / "comparison.png")


def test_runs_of_several_seeds_are_one_curve(tmp_path: Path) -> None:
    _, runs = planned(tmp_path, "{optim.lr: {values: [0.1, 0.2]}, run.seed: {values: [0, 1]}}")
    for run in runs:
        settings = {name.replace(".", "__"): value for name, value in run.settings.items()}
        write_run(run.path, finished(0.9), lines([0.6, 0.7]), **settings)
    assert draw_comparison(runs, tmp_path / "new" / "comparison.png")
    assert matplotlib.image.imread(tmp_path / "new" / "comparison.png").shape[1] == 1800


def test_a_damaged_list_of_stops_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "stopped.json").write_text("{")
    with pytest.raises(UserError, match=r"stopped.json cannot be read .*: remove it"):
        EarlyStops(tmp_path)


def test_names_that_hold_nan_stay_as_they_are(tmp_path: Path) -> None:
    sweep, runs = planned(tmp_path, "{optim.lr: {value: 0.1}}")
    named = dataclasses.replace(runs[0], settings={"model.name": "timm/convnext_nano"})
    result = Result(named, "not begun", math.nan, math.nan, math.nan)
    (line,) = as_table([result], sweep.metric).splitlines()[1:]
    assert "convnext_nano" in line and line.split()[:4] == ["0", "-", "-", "-"]
