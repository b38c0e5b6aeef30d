"""A comparison of runs as tables, for a terminal, a page and a spreadsheet."""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lockstep.files import replace_file
from lockstep.report.comparison import SEED, Group, RunRecord, differing_settings, names_of, paired_test, shown
from lockstep.run.history import compare_histories

ABSENT = "-"


class Cell(NamedTuple):
    """What is shown, and what it is sorted by; NaN where there is nothing."""

    text: str
    value: float | str

    @property
    def is_number(self) -> bool:
        return isinstance(self.value, float)


@dataclass(frozen=True)
class Table:
    """Rows under named columns."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class _Measure:
    title: str
    of: Callable[[RunRecord], float]
    format: str
    spread: bool = True


def _number(key: str) -> Callable[[RunRecord], float]:
    return lambda run: run.number(key)


_TEST_ACCURACY = _Measure("test accuracy", _number("test_accuracy"), "{:.2%}")
_MEASURES = (
    _Measure("best val accuracy", lambda run: run.best_val_accuracy, "{:.2%}"),
    _TEST_ACCURACY,
    _Measure("test loss", _number("test_loss"), "{:.4f}"),
    _Measure("epochs", lambda run: run.epochs, "{:.3g}", spread=False),
    _Measure("images/s", _number("images_per_second"), "{:,.0f}"),
    _Measure("train seconds", _number("train_seconds"), "{:,.1f}"),
    _Measure("process-hours", lambda run: run.process_hours, "{:.3g}"),
)


def text_cell(text: str) -> Cell:
    """A cell that is sorted by its text."""
    return Cell(text, text)


def group_table(groups: Sequence[Group]) -> Table:
    """A row per group: results, speed and cost of a run, each the mean and sample standard deviation over seeds."""
    rows = [
        [
            Cell(str(number), float(number)),
            text_cell(group.label),
            text_cell(_states(group)),
            _seeds(group),
            *(_mean(group.values(measure.of), measure) for measure in _MEASURES),
        ]
        for number, group in enumerate(groups, 1)
    ]
    columns = ("#", "group", "state", "seeds", *(measure.title for measure in _MEASURES))
    return Table("Groups: mean ± standard deviation over the seeds of finished runs", columns, rows)


def _seeds(group: Group) -> Cell:
    """How many seeds the means are over, and of how many."""
    finished = {run.config[SEED] for run in group.runs if run.is_finished}
    counted, there = len(finished or group.seeds), len(group.seeds)
    return Cell(str(there) if counted == there else f"{counted} of {there}", float(counted))


def _states(group: Group) -> str:
    """The state of all runs, or how many have each."""
    counts = Counter(run.state for run in group.runs)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{count} {state}" for state, count in counts.items())


def _mean(values: dict[int, float], measure: _Measure) -> Cell:
    if not values:
        return Cell(ABSENT, math.nan)
    numbers = np.array(list(values.values()))
    mean, text = float(numbers.mean()), measure.format.format(numbers.mean())
    if measure.spread and len(numbers) > 1 and np.isfinite(numbers).all():
        text += f" ± {measure.format.format(numbers.std(ddof=1))}"
    return Cell(text, mean)


def settings_table(groups: Sequence[Group]) -> Table:
    """A row per setting that is not the same in all runs, a column per group, by its number."""
    runs = [run for group in groups for run in group.runs]
    rows = [
        [text_cell(name), *(text_cell(_shown_in(group, name)) for group in groups)] for name in differing_settings(runs)
    ]
    return Table("Settings that differ", ("setting", *(str(number) for number in range(1, len(groups) + 1))), rows)


def _shown_in(group: Group, name: str) -> str:
    return " or ".join(dict.fromkeys(shown(run.config[name]) for run in group.runs))


def paired_table(groups: Sequence[Group]) -> Table:
    """A row per group but the first: a paired t-test of test accuracy against that one, over the seeds of both.

    Empty if no group shares two seeds with it.
    """
    first = groups[0].values(_TEST_ACCURACY.of)
    rows = []
    for number, group in enumerate(groups[1:], 2):
        test = paired_test(first, group.values(_TEST_ACCURACY.of))
        p = "needs 2 shared seeds" if test.pairs < 2 else "no spread" if math.isnan(test.p) else f"{test.p:.3g}"
        difference = ABSENT if math.isnan(test.difference) else f"{test.difference * 100:+.2f} points"
        counts = Cell(str(number), float(number)), text_cell(group.label), Cell(str(test.pairs), float(test.pairs))
        rows.append([*counts, Cell(difference, test.difference), Cell(p, test.p)])
    title = "Paired t-test of test accuracy against group 1, over shared seeds"
    told = rows if any(row[2].value >= 2 for row in rows if isinstance(row[2].value, float)) else []
    return Table(title, ("#", "group", "pairs", "mean difference", "p"), told)


def parting_table(runs: Sequence[RunRecord]) -> Table:
    """A row per run whose training an earlier one is, too: through which step both are equal to the last bit."""
    firsts: dict[str, int] = {}
    names, rows = names_of(runs), []
    for index, run in enumerate(runs):
        first = firsts.setdefault(run.training, index)
        if first != index:
            verdict = compare_histories(runs[first].history, run.history)
            rows.append([text_cell(names[index]), text_cell(names[first]), text_cell(verdict)])
    return Table("Runs of one training", ("run", "the same training as", "digests"), rows)


def as_text(table: Table) -> str:
    """Title, names of the columns and rows, in columns as wide as they need; numbers stand on the right."""
    shown_rows = [list(table.columns), *([_printable(cell.text) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*shown_rows, strict=True)]
    on_right = [all(row[index].is_number for row in table.rows) for index in range(len(widths))]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, on_right, strict=True)
        ).rstrip()
        for row in shown_rows
    ]
    return "\n".join([table.title, *lines])


def _printable(text: str) -> str:
    """A name may hold line ends and a terminal's control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def write_csv(groups: Sequence[Group], path: Path) -> None:
    """A row per run, for a spreadsheet or pandas: what is absent is empty, shares and seconds are plain numbers."""
    runs = [run for group in groups for run in group.runs]
    settings = [SEED, *differing_settings(runs)]
    file = io.StringIO()
    rows = [_row(group, run, settings) for group in groups for run in group.runs]
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, file.getvalue().encode(errors="surrogateescape"))


_RESULTS = ("test_accuracy", "test_loss", "best_step", "steps")
_TIMES = ("images_per_second", "train_seconds", "wall_seconds")


def _row(group: Group, run: RunRecord, settings: Sequence[str]) -> dict[str, Any]:
    numbers = {
        "best_val_accuracy": run.best_val_accuracy,
        **{key: run.number(key) for key in _RESULTS},
        "epochs": run.epochs,
        **{key: run.number(key) for key in _TIMES},
        "processes": float(run.processes),
        "process_hours": run.process_hours,
    }
    return {
        "name": run.name,
        "path": str(run.path),
        "state": run.state,
        "group": group.label,
        **{name: shown(run.config[name]) for name in settings},
        **{key: "" if math.isnan(value) else f"{value:.10g}" for key, value in numbers.items()},
        "device": str(run.starts[-1].get("device", "")) if run.starts else "",
    }
