"""Many runs side by side: what each run folder holds, and the groups of runs that differ in nothing but their seed.

Nothing but files of the run folders is read. A run that is unfinished, or whose files are damaged in part, is one with
fewer numbers: what is absent is not a number (NaN), and no mean counts it.
"""

import glob
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import UserError, did_you_mean
from lockstep.files import read_json
from lockstep.run.history import curve, read_history, read_starts
from lockstep.settings.config import shaping_settings
from lockstep.settings.yaml import load_config

SEED = "run.seed"
_LONGEST_LABEL = 72


@dataclass(frozen=True, eq=False)
class RunRecord:
    """What a run folder says of its run."""

    path: Path
    config: dict[str, Any]
    """Flat `section.key -> value` of the settings that shape the result"""
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    starts: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def state(self) -> str:
        """The summary's word: running, preempted, finished or failed; unknown without one."""
        return str(self.summary.get("state", "unknown"))

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    @cached_property
    def training(self) -> str:
        """The same text for runs of one training: their shaping settings are equal, the seed too."""
        return repr(sorted(self.config.items()))

    def number(self, key: str) -> float:
        """A number of the summary; NaN if there is none."""
        value = self.summary.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan

    @property
    def best_val_accuracy(self) -> float:
        """Of the validation whose weights are the result; before the end, the best so far; a share in [0, 1]."""
        so_far = [point.value for point in curve(self.history, "val", "accuracy") if math.isfinite(point.value)]
        return self.number("best_val_accuracy") if self.is_finished else max(so_far, default=math.nan)

    @property
    def epochs(self) -> float:
        """Epochs begun."""
        begun = [float(line["epoch"]) for line in self.history[-1:] if isinstance(line.get("epoch"), int | float)]
        return self.number("epochs") if self.is_finished else max(begun, default=math.nan)

    @property
    def processes(self) -> int:
        """The most of any start; 1 where no start says."""
        counts = [start.get("processes") for start in self.starts]
        return max((count for count in counts if isinstance(count, int)), default=1)

    @property
    def process_hours(self) -> float:
        """Wall time, without pauses, times processes."""
        return self.number("wall_seconds") * self.processes / 3600


@dataclass(frozen=True)
class PairedTest:
    """Two groups over the seeds that both have: the mean difference, and how likely chance alone makes as large a one.

    `p`, of a two-sided paired t-test, is NaN with fewer than two pairs, and where all differences are the same.
    """

    pairs: int
    difference: float
    p: float


@dataclass(frozen=True)
class Curve:
    """A metric of a group over training: arrays of one length. Mean, minimum and maximum are over its trainings."""

    epochs: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of settings that count as the same."""

    label: str
    runs: tuple[RunRecord, ...]
    settings: dict[str, Any]
    """The settings that tell the groups apart"""

    @property
    def trainings(self) -> list[RunRecord]:
        """A run of each training, a finished one if there is any: a repeated run says nothing new of the spread."""
        finished_first = sorted(self.runs, key=lambda run: not run.is_finished)
        chosen = {run.training: run for run in reversed(finished_first)}
        return [run for run in self.runs if chosen[run.training] is run]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.config[SEED] for run in self.runs})

    def values(self, measure: Callable[[RunRecord], float]) -> dict[int, float]:
        """Seed to value, the mean where a seed has several trainings; NaN is left out.

        Only finished runs count, unless there is none: half a training would pull the mean.
        """
        chosen = [run for run in self.trainings if run.is_finished] or self.trainings
        measured = [(run.config[SEED], value) for run in chosen if not math.isnan(value := measure(run))]
        seeds = sorted({seed for seed, _ in measured})
        return {seed: float(np.mean([value for own, value in measured if own == seed])) for seed in seeds}

    def curve(self, split: str, key: str) -> Curve:
        """A metric over epochs. Where trainings end earlier, the others go on alone; between lines it is linear."""
        series = [points for run in self.trainings if (points := curve(run.history, split, key))]
        epochs = np.unique([point.epoch for points in series for point in points])
        rows = np.full((len(series), len(epochs)), np.nan)
        for row, points in zip(rows, series, strict=True):
            own, values, _ = np.array(points).T
            values = np.where(np.isfinite(values), values, np.nan)
            row[:] = np.interp(epochs, own, values, left=np.nan, right=np.nan)
        there = ~np.isnan(rows).all(axis=0)
        epochs, rows = epochs[there], rows[:, there]
        if not rows.size:
            return Curve(*np.empty((4, 0)))
        return Curve(epochs, np.nanmean(rows, axis=0), np.nanmin(rows, axis=0), np.nanmax(rows, axis=0))


def find_runs(texts: Sequence[str]) -> list[Path]:
    """The folders that run folders, folders of them and globs stand for, in the order given.

    A folder in which no run is found stands for itself. Raises UserError for what leads nowhere.
    """
    found: list[Path] = []
    for text in texts:
        folders = [Path(text)] if Path(text).is_dir() else [Path(path) for path in sorted(glob.glob(text))]
        folders = [folder for folder in folders if folder.is_dir()]
        if not folders:
            raise UserError(f"there is no run in {text}")
        for folder in folders:
            inside = (
                []
                if (folder / "config.yaml").is_file()
                else sorted(path.parent for path in folder.glob("*/config.yaml"))
            )
            found += inside or [folder]
    return found


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in these folders, in the order given; raises UserError that names a folder that holds none."""
    return [_read_run(path) for path in paths]


def _read_run(path: Path) -> RunRecord:
    if not (path / "config.yaml").is_file():
        raise UserError(f"there is no run in {path}" + (": it has no config.yaml" if path.is_dir() else ""))
    config = shaping_settings(load_config(path / "config.yaml"))
    return RunRecord(path, config, _read_summary(path), read_history(path), read_starts(path))


def _read_summary(path: Path) -> dict[str, Any]:
    """Empty where there is none that can be read."""
    try:
        summary = read_json(path / "summary.json")
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def group_runs(runs: Sequence[RunRecord], by: Sequence[str] = ()) -> list[Group]:
    """Runs whose shaping settings are equal but for the seed, together; in the order of their first runs.

    With `by`, those together whose settings of these names are equal, whatever the others are. Raises UserError for a
    name that is none.
    """
    known = sorted(runs[0].config) if runs else []
    for name in by:
        if runs and name not in known:
            raise UserError(f"{name} is no setting that shapes a result.{did_you_mean(name, known)}")
    names = list(by) or differing_settings(runs)
    members: dict[str, list[RunRecord]] = {}
    for run in runs:
        members.setdefault(repr([run.config[name] for name in names]), []).append(run)
    labels = _labels(list(members.values()), names)
    return [
        Group(label, tuple(group), {name: group[0].config[name] for name in names})
        for label, group in zip(labels, members.values(), strict=True)
    ]


def differing_settings(runs: Sequence[RunRecord]) -> list[str]:
    """Names of the shaping settings, but for the seed, that are not the same in all runs."""
    if not runs:
        return []
    return [name for name in runs[0].config if name != SEED and len({repr(run.config[name]) for run in runs}) > 1]


def paired_test(ours: dict[int, float], theirs: dict[int, float]) -> PairedTest:
    """Whether `theirs` are larger or smaller than `ours`, seed by seed; both are seed -> value."""
    pairs = [(theirs[seed], ours[seed]) for seed in ours if seed in theirs]
    if len(pairs) < 2:
        return PairedTest(len(pairs), math.nan, math.nan)
    other, one = np.array(pairs).T
    difference, p = float(np.mean(other - one)), math.nan
    if np.ptp(other - one) > 1e-12:  # else there is nothing but rounding to divide by
        from scipy.stats import ttest_rel

        p = float(ttest_rel(other, one).pvalue)
    return PairedTest(len(pairs), difference, p)


def _labels(groups: Sequence[Sequence[RunRecord]], names: Sequence[str]) -> list[str]:
    """Settings where they tell the groups apart in a few words, else the names of their first runs."""
    labels = [" ".join(f"{name}={shown(group[0].config[name])}" for name in names) for group in groups]
    if len(groups) > 1 and max(map(len, labels)) <= _LONGEST_LABEL:
        return labels
    return names_of([group[0] for group in groups])


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """The runs' names; where two runs have the same, their paths."""
    times = Counter(run.name for run in runs)
    return [run.name if times[run.name] == 1 else str(run.path) for run in runs]


def shown(value: Any) -> str:
    """A setting's value as a flag takes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
