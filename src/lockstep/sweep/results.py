"""The runs of a sweep's tasks, and what has come of them: read from their run folders.

Beside the runs stands the sweep's own folder, `<run.root>/sweep_<file>/`: a log of each task (`task_003.log`), the
tasks that were stopped early (`stopped.json`), and at the end the table of all (`results.csv`) and their curves in one
figure (`comparison.png`).
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.errors import UsageError, UserError
from lockstep.files import path_of, read_json, replace_file, write_json
from lockstep.report.comparison import Group, group_runs, read_runs
from lockstep.report.figures import plot_comparison
from lockstep.run.history import read_history
from lockstep.settings.cli import parse_config, run_dir_of
from lockstep.settings.config import Config
from lockstep.settings.types import written
from lockstep.sweep.file import Metric, Sweep, Task


@dataclass(frozen=True)
class TaskRun:
    """A task, the run that trains it, and where its output goes."""

    index: int
    settings: Task
    config: Config
    path: Path
    """The run folder"""
    log: Path

    @property
    def label(self) -> str:
        """Its settings in short: without the section where the rest tells them apart."""
        keys = [name.split(".")[1] for name in self.settings]
        unique = len(set(keys)) == len(keys)
        return " ".join(
            f"{key if unique else name}={written(value)}"
            for key, (name, value) in zip(keys, self.settings.items(), strict=True)
        )

    @property
    def summary(self) -> dict[str, Any]:
        """Empty where there is none that can be read."""
        try:
            summary = read_json(self.path / "summary.json")
        except (OSError, ValueError):
            return {}
        return summary if isinstance(summary, dict) else {}

    @property
    def is_finished(self) -> bool:
        return self.summary.get("state") == "finished"

    def validations(self, metric: Metric) -> list[float]:
        """The metric after each validation so far."""
        lines = [line for line in read_history(self.path) if line.get("split") == "val"]
        return [float(line[metric.field]) for line in lines if isinstance(line.get(metric.field), int | float)]


def plan_runs(sweep: Sweep, more: Sequence[str]) -> list[TaskRun]:
    """The run of each task; raises UsageError, before anything is started, for settings that do not go together."""
    runs: list[TaskRun] = []
    for index, settings in enumerate(sweep.tasks):
        try:
            config = parse_config(sweep.arguments_of(index, more))
        except UsageError as mistake:
            raise UsageError(f"task {index} of {sweep.path}: {mistake}") from mistake
        log = folder_of(sweep, config) / f"task_{index:03}.log"
        runs.append(TaskRun(index, settings, config, run_dir_of(config), log))
    first = {run.path: run for run in reversed(runs)}
    if twin := next((run for run in runs if first[run.path] is not run), None):
        raise UserError(f"{sweep.path}: tasks {first[twin.path].index} and {twin.index} are one run, {twin.path}")
    return runs


def folder_of(sweep: Sweep, config: Config) -> Path:
    """The sweep's own folder."""
    return path_of(config.run.root) / f"sweep_{sweep.path.stem}"


class EarlyStops:
    """Which runs were stopped early, and the bracket that each failed: `stopped.json`, which later starts read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "stopped.json"
        try:
            known = read_json(self._path)
        except FileNotFoundError:
            known = {}
        except ValueError as damage:
            raise UserError(f"{self._path} cannot be read ({damage}): remove it, and its runs go on") from damage
        self._brackets: dict[str, int] = known if isinstance(known, dict) else {}

    def __contains__(self, run: TaskRun) -> bool:
        return run.path.name in self._brackets

    def add(self, run: TaskRun, bracket: int) -> None:
        """Note a run for good."""
        self._brackets[run.path.name] = bracket
        write_json(self._path, self._brackets)


@dataclass(frozen=True)
class Result:
    """A line of the table. Shares in [0, 1], seconds of wall time; NaN: not there (yet)."""

    run: TaskRun
    state: str
    """finished, stopped early, or what the run's summary says"""
    value: float
    """The best of the sweep's metric"""
    test_accuracy: float
    seconds: float


def read_result(run: TaskRun, metric: Metric, stops: EarlyStops) -> Result:
    """What has come of a task so far."""
    summary = run.summary
    state = "stopped early" if run in stops else str(summary.get("state", "not begun"))
    numbers = [summary.get(name) for name in ("test_accuracy", "wall_seconds")]
    test, seconds = (float(number) if isinstance(number, int | float) else math.nan for number in numbers)
    return Result(run, state, metric.best(run.validations(metric)), test, seconds)


def ranked(results: Iterable[Result], metric: Metric) -> list[Result]:
    """The best first, those without the metric last, equal ones in the order of tasks."""
    sign = -1 if metric.maximize else 1
    return sorted(results, key=lambda result: (math.isnan(result.value), sign * result.value, result.run.index))


def as_table(results: Sequence[Result], metric: Metric) -> str:
    """Lines to read, in the order given."""

    def shown(number: float, digits: int) -> str:
        return "-" if math.isnan(number) else f"{number:.{digits}f}"

    lines = [f"{'task':>4}  {metric.name:>14}  {'test/accuracy':>13}  {'seconds':>7}  settings"]
    for result in results:
        seconds = shown(result.seconds, 0)
        numbers = f"{shown(result.value, 4):>14}  {shown(result.test_accuracy, 4):>13}  {seconds:>7}"
        note = "" if result.state == "finished" else f" ({result.state})"
        lines.append(f"{result.run.index:>4}  {numbers}  {result.run.label}{note}")
    return "\n".join(lines)


def write_table(results: Sequence[Result], metric: Metric, path: Path) -> None:
    """The same as a file for other programs, with the run folder of each task and a column for each setting."""
    names = list(dict.fromkeys(name for result in results for name in result.run.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "run", "state", metric.name, "test/accuracy", "wall_seconds", *names])
    for result in results:
        settings = [written(result.run.settings[name]) if name in result.run.settings else "" for name in names]
        numbers = [result.value, result.test_accuracy, result.seconds]
        shown = ["" if math.isnan(number) else number for number in numbers]
        writer.writerow([result.run.index, result.run.path.name, result.state, *shown, *settings])
    replace_file(path, text.getvalue().encode())


def draw_comparison(runs: Sequence[TaskRun], path: Path) -> bool:
    """The curves of all tasks that have begun, those that differ in nothing but the seed as one; whether there is any.

    A curve is named by its task's settings, as the sweep file has them.
    """
    begun = {run.path: run for run in runs if (run.path / "config.yaml").is_file()}
    groups = [_named_by_task(group, begun) for group in group_runs(read_runs(list(begun)))]
    if groups:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_comparison(groups, path)
    return bool(groups)


def _named_by_task(group: Group, runs: dict[Path, TaskRun]) -> Group:
    first = runs[group.runs[0].path]
    several = {name: value for name, value in first.settings.items() if name != "run.seed" or len(group.runs) == 1}
    return replace(group, label=replace(first, settings=several).label or group.label)
