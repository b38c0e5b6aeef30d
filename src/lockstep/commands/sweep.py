"""The tasks of a W&B sweep file, without a W&B server: `lockstep sweep list FILE` and `run FILE INDEX`.

A file in configs/sweeps/ is W&B's: `wandb sweep FILE` takes it, too. Its parameters are settings (`optim.lr`), and what
`command` has between `${program}` and `${args}` is given to every task. `method: grid` has a task for each combination,
the last parameter changing fastest; `method: random` has `run_cap` tasks, drawn by a generator that the sweep's `name`
seeds: raising run_cap adds tasks and leaves the earlier ones as they are. Each task is a run of its own, as train.py
names it, in the W&B group of its job array (or of the file).

`run` takes more arguments of train.py behind INDEX, and may stand where train.py does:
`accelerate launch -m lockstep sweep run configs/sweeps/digits_grid.yaml 3`.
"""

import argparse
import itertools
import json
import math
import os
import random
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import UsageError, UserError, did_you_mean
from lockstep.settings.cli import RECIPES
from lockstep.settings.config import Config, shaping_settings
from lockstep.settings.types import checked
from lockstep.settings.yaml import HINTS, read_yaml

_MAX_TASKS = 10_000
_DRAWS_PER_TASK = 100  # before we conclude that there are not as many different tasks

Task = dict[str, Any]
"""Setting -> value"""


@dataclass(frozen=True)
class Sweep:
    """What a sweep file comes to."""

    path: Path
    arguments: tuple[str, ...]
    """Arguments that all tasks share"""
    tasks: tuple[Task, ...]

    def arguments_of(self, index: int, more: Sequence[str] = ()) -> list[str]:
        """train.py's arguments for a task; UserError if there is no such task or `more` interferes with the sweep."""
        if not 0 <= index < len(self.tasks):
            raise UserError(f"{self.path} has the tasks 0 to {len(self.tasks) - 1}, not {index}")
        for argument in more:
            name = argument.split("=", 1)[0].removeprefix("--")
            if name in self.tasks[index]:
                raise UserError(f"{argument}: {self.path} sets {name} for each task: remove it here or there")
            if name == "run.name":
                raise UserError(f"{argument}: the tasks of a sweep cannot share a run folder: leave --run.name out")
        group = os.environ.get("SLURM_ARRAY_JOB_ID", self.path.stem)
        return [*self.arguments, f"--run.group={group}", *more, *spelled(self.tasks[index])]


def spelled(task: Task) -> list[str]:
    """A task's settings as flags."""
    return [f"--{name}={value}" for name, value in task.items()]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file; raises UserError, naming file and key, for what cannot be enumerated without a server."""
    content = _load(path)
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{path} has no parameters, for example `parameters: {{optim.lr: {{values: [0.1, 0.01]}}}}`")
    known = shaping_settings(Config()).keys()
    for name, parameter in parameters.items():
        if name not in known:
            # A setting that does not shape the result would give two tasks one run folder.
            raise UserError(f"{path}: {name} is no setting that a sweep can vary.{did_you_mean(str(name), known)}")
        if not isinstance(parameter, dict):
            raise UserError(f"{path}: {name} needs `value`, `values`, or `min` and `max`")
        _check_values(path, name, parameter)
    method = content.get("method")
    if method == "grid":
        tasks = _grid(path, parameters)
    elif method == "random":
        tasks = _draw(path, parameters, content.get("run_cap"), str(content.get("name", path.stem)))
    else:
        raise UserError(f"{path}: method {method} needs W&B's server (wandb sweep {path}); here: grid or random")
    return Sweep(path, _shared_arguments(path, content), tuple(tasks))


def _check_values(path: Path, name: str, parameter: dict[str, Any]) -> None:
    """Raise UserError for a value that is of another type than the setting."""
    values = parameter.get("values")
    given = list(values) if isinstance(values, list) else []
    for value in given + ([parameter["value"]] if "value" in parameter else []):
        try:
            checked(name, value, HINTS[name])
        except UserError as mistake:
            raise UserError(f"{path}: {mistake}") from mistake


def _load(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold method and parameters, as W&B's sweep files do")
    return content


def _shared_arguments(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    command = content.get("command", ["${program}", "${args}"])
    if not isinstance(command, list):
        raise UserError(f"{path}: command must be a list that names ${{program}} and ends with ${{args}}")
    command = list(map(str, command))
    if "${program}" not in command or command[-1] != "${args}":
        raise UserError(f"{path}: command must name ${{program}} and end with ${{args}}")
    return tuple(command[command.index("${program}") + 1 : -1])


def _grid(path: Path, parameters: dict[str, dict[str, Any]]) -> list[Task]:
    choices = []
    for name, parameter in parameters.items():
        values = [parameter["value"]] if "value" in parameter else parameter.get("values")
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: {name} needs `values` (a list) in a grid")
        if len(set(map(_identity, values))) < len(values):
            raise UserError(f"{path}: {name} has a value twice: two tasks would be one run")
        choices.append(values)
    count = math.prod(map(len, choices))
    if count > _MAX_TASKS:
        raise UserError(f"{path}: {count} tasks are too many (at most {_MAX_TASKS}): shorten the lists, or draw")
    return [dict(zip(parameters, values, strict=True)) for values in itertools.product(*choices)]


def _draw(path: Path, parameters: dict[str, dict[str, Any]], count: Any, seed: str) -> list[Task]:
    if not isinstance(count, int) or not 1 <= count <= _MAX_TASKS:
        raise UserError(f"{path}: method random needs `run_cap`, the number of tasks, from 1 to {_MAX_TASKS}")
    if (most := _most_tasks(parameters)) < count:
        raise UserError(f"{path}: no {count} different tasks can be drawn, only {most:.0f}: lower run_cap")
    generator = random.Random(seed)
    tasks: dict[str, Task] = {}
    for _ in range(_DRAWS_PER_TASK * count):
        task = {name: _draw_value(path, name, parameter, generator) for name, parameter in parameters.items()}
        tasks.setdefault(_identity(task), task)
        if len(tasks) == count:
            return list(tasks.values())
    raise UserError(f"{path}: no {count} different tasks can be drawn, only {len(tasks)}: lower run_cap")


def _most_tasks(parameters: dict[str, dict[str, Any]]) -> float:
    """How many different tasks there can be: infinitely many where a number is drawn."""
    lists = ([given["value"]] if "value" in given else given.get("values") for given in parameters.values())
    return math.prod(len(values) if isinstance(values, list) else math.inf for values in lists)


def _identity(value: Any) -> str:
    """The same text for values that are equal, of any kind."""
    return json.dumps(value, sort_keys=True, default=str)


_DISTRIBUTIONS: dict[str, Callable[[random.Random, dict[str, Any]], Any]] = {
    "constant": lambda generator, given: given["value"],
    "categorical": lambda generator, given: generator.choices(given["values"], given.get("probabilities"))[0],
    "int_uniform": lambda generator, given: generator.randint(given["min"], given["max"]),
    "uniform": lambda generator, given: generator.uniform(given["min"], given["max"]),
    "q_uniform": lambda generator, given: _rounded(generator.uniform(given["min"], given["max"]), given.get("q", 1)),
    "log_uniform_values": lambda generator, given: math.exp(
        generator.uniform(math.log(given["min"]), math.log(given["max"]))
    ),
}


def _rounded(value: float, step: float) -> float:
    digits = max(0, -math.floor(math.log10(step))) + 1
    return round(round(value / step) * step, digits)


def _draw_value(path: Path, name: str, given: dict[str, Any], generator: random.Random) -> Any:
    kind = given.get("distribution")
    if kind is None and "value" in given:
        kind = "constant"
    elif kind is None and "values" in given:
        kind = "categorical"
    elif kind is None:
        whole = isinstance(given.get("min"), int) and isinstance(given.get("max"), int)
        kind = "int_uniform" if whole else "uniform"
    if kind not in _DISTRIBUTIONS:
        raise UserError(f"{path}: {name}: distribution {kind} is not one of {', '.join(_DISTRIBUTIONS)}")
    try:
        value = _DISTRIBUTIONS[kind](generator, given)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as problem:
        raise UserError(f"{path}: {name}: {kind} does not go with {given} ({problem!r})") from problem
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """List a sweep's tasks, or become train.py for one of them."""
    # One index at a time, and no abbreviations: the rest is train.py's.
    parser = argparse.ArgumentParser(prog="lockstep sweep", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {"list": "print the tasks", "run": "train one task"}.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("file", type=Path, metavar="FILE")
        if name == "run":
            command.add_argument("index", type=int, metavar="INDEX", help="of the task, from 0")
    options, more = parser.parse_known_args(arguments)
    try:
        sweep = read_sweep(options.file)
        if options.command == "run":
            return _become_train(sweep.arguments_of(options.index, more))
    except UserError as mistake:
        raise UsageError(str(mistake)) from mistake
    for index, task in enumerate(sweep.tasks):
        print(f"{index}: {' '.join(spelled(task))}")
    print(f"sbatch --array=0-{len(sweep.tasks) - 1} slurm/array_sweep.sbatch {sweep.path}", file=sys.stderr)
    return 0


def _become_train(arguments: list[str]) -> int:
    program = str(RECIPES.parent / "train.py")
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
    return 0
