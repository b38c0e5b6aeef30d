"""A W&B sweep file, and the tasks that it comes to without a server.

Its parameters are settings: `optim.lr`, the same nested as W&B nests (`optim: {parameters: {lr: ...}}`), or a section
whose values are several settings at once (`optim: {values: [{name: sgd, lr: 0.1}, {name: adam, lr: 0.001}]}`). What
`command` has between `${program}` and `${args}` is given to every task. `method: grid` has a task for each
combination, the last parameter changing fastest; `method: random` has `run_cap` tasks, drawn by a generator that the
sweep's `name` seeds: raising run_cap adds tasks and leaves the earlier ones as they are.
"""

import itertools
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lockstep.errors import UserError, did_you_mean
from lockstep.settings.config import Config, shaping_settings
from lockstep.settings.types import checked, written
from lockstep.settings.yaml import HINTS, SECTIONS, read_yaml
from lockstep.sweep.distribution import MOST_VALUES, choices, drawn, most_values
from lockstep.sweep.hyperband import Hyperband, read_hyperband

_MAX_TASKS = MOST_VALUES
_DRAWS_PER_TASK = 100  # before we conclude that there are not as many different tasks

_METHODS = ("grid", "random", "bayes")
_KEYS = (
    "$schema", "program", "method", "parameters", "metric", "early_terminate", "command", "name", "description",
    "project", "entity", "run_cap", "settings", "job", "image_uri", "controller",
)  # fmt: skip
"""Those of W&B's files"""
_FIELDS = ("accuracy", "loss", "top5_accuracy", "train_loss", "train_accuracy", "train_val_loss_ratio")

Task = dict[str, Any]
"""Setting -> value"""
Parameters = dict[str, dict[str, Any]]
"""Setting, or section of settings -> what it may be"""


@dataclass(frozen=True)
class Metric:
    """What tasks are compared by: a number of every validation."""

    field: str = "accuracy"
    maximize: bool = True

    @property
    def name(self) -> str:
        """As W&B has it"""
        return f"val/{self.field}"

    def best(self, values: Sequence[float]) -> float:
        """The best of a run's validations; NaN if none is finite."""
        finite = [value for value in values if math.isfinite(value)]
        return (max if self.maximize else min)(finite, default=math.nan)


@dataclass(frozen=True)
class Sweep:
    """What a sweep file comes to."""

    path: Path
    arguments: tuple[str, ...]
    """Arguments that all tasks share"""
    tasks: tuple[Task, ...]
    metric: Metric = Metric()
    hyperband: Hyperband | None = None

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
    return [f"--{name}={written(value)}" for name, value in task.items()]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file; raises UserError, naming file and key, for what cannot be enumerated without a server."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold method and parameters, as W&B's sweep files do")
    try:
        return _understand(path, content)
    except UserError as mistake:
        raise UserError(f"{path}: {mistake}") from mistake


def _understand(path: Path, content: dict[str, Any]) -> Sweep:
    for key in content:
        if key not in _KEYS:
            raise UserError(f"{key} is no key of a sweep file.{did_you_mean(str(key), _KEYS)}".rstrip("."))
    parameters = _parameters(content.get("parameters"))
    method = content.get("method")
    if method not in _METHODS:
        given = "there is no method" if method is None else f"method {method} is none of W&B's"
        raise UserError(f"{given}: grid or random (bayes with W&B's server){did_you_mean(str(method), _METHODS)}")
    if method == "grid":
        tasks = _grid(parameters)[: _cap(content.get("run_cap"))]
    elif method == "random":
        tasks = _draw(parameters, content.get("run_cap"), str(content.get("name", path.stem)))
    else:
        raise UserError(f"method {method} needs W&B's server (wandb sweep {path}); here: grid or random")
    metric = _metric(content.get("metric"))
    early = content.get("early_terminate")
    if early is not None and "metric" not in content:
        raise UserError("early_terminate needs `metric`, by which runs are judged")
    hyperband = read_hyperband(early, maximize=metric.maximize)
    return Sweep(path, _shared_arguments(content), tuple(tasks), metric, hyperband)


def _parameters(given: Any, prefix: str = "") -> Parameters:
    """All parameters by their full names, nested ones too."""
    if not isinstance(given, dict) or not given:
        place = f"{prefix[:-1]} has no parameters" if prefix else "there are no parameters"
        raise UserError(f"{place}, for example `parameters: {{optim.lr: {{values: [0.1, 0.01]}}}}`")
    found: Parameters = {}
    for key, parameter in given.items():
        name = f"{prefix}{key}"
        nested = isinstance(parameter, dict) and set(parameter) == {"parameters"}
        if nested and name in SECTIONS:
            found |= _parameters(parameter["parameters"], f"{name}.")
        elif name not in SECTIONS:
            _require_varied(name)
            found[name] = parameter
        else:
            found[name] = parameter
        if not isinstance(parameter, dict):
            raise UserError(f"{name} needs `value`, `values`, or `min` and `max`")
    return found


@cache
def _varied() -> frozenset[str]:
    return frozenset(shaping_settings(Config()))


def _require_varied(name: str) -> None:
    if name not in (known := _varied()):
        # A setting that does not shape the result would give two tasks one run folder.
        raise UserError(f"{name} is no setting that a sweep can vary.{did_you_mean(name, known)}")


def _cap(given: Any) -> int | None:
    """How many tasks of a grid count; None: all."""
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise UserError(f"run_cap must be a whole number from 1 on, not {given}")
    return given


def _metric(given: Any) -> Metric:
    if given is None:
        return Metric()
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise UserError("metric needs a name, for example `metric: {name: val/accuracy, goal: maximize}`")
    split, _, field = given["name"].partition("/")
    if split != "val" or field not in _FIELDS:
        near = did_you_mean(given["name"], [f"val/{known}" for known in _FIELDS])
        raise UserError(
            f"metric {given['name']} is no number of a validation, such as val/accuracy or val/loss.{near}".rstrip(".")
        )
    goal = given.get("goal", "minimize")  # W&B's own default
    if goal not in ("minimize", "maximize"):
        raise UserError(f"metric: goal must be minimize or maximize, not {goal}")
    if field.endswith("accuracy") and "goal" not in given:
        raise UserError(f"metric {given['name']} needs `goal: maximize`: without it W&B would minimize it")
    return Metric(field, goal == "maximize")


def _shared_arguments(content: dict[str, Any]) -> tuple[str, ...]:
    command = content.get("command", ["${program}", "${args}"])
    if not isinstance(command, list):
        raise UserError("command must be a list that names ${program} and ends with ${args}")
    command = list(map(str, command))
    if "${program}" not in command or command[-1] != "${args}":
        raise UserError("command must name ${program} and end with ${args}")
    return tuple(command[command.index("${program}") + 1 : -1])


def _of_parameter(name: str, ask: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return ask(*arguments)
    except UserError as mistake:
        message = str(mistake)
        if f"--{name}" in message:  # names the setting itself
            raise
        raise UserError(f"{name} {message}" if message.startswith("needs") else f"{name}: {message}") from mistake


def _grid(parameters: Parameters) -> list[Task]:
    listed = {name: _of_parameter(name, choices, given) for name, given in parameters.items()}
    count = math.prod(map(len, listed.values()))
    if count > _MAX_TASKS:
        raise UserError(f"{count} tasks are too many (at most {_MAX_TASKS}): shorten the lists, or draw")
    parts = {name: [_settings(name, value) for value in values] for name, values in listed.items()}
    for name, values in parts.items():
        if len(set(map(_identity, values))) < len(values):
            raise UserError(f"{name} has a value twice: two tasks would be one run")
    return [_joined(combination) for combination in itertools.product(*parts.values())]


def _draw(parameters: Parameters, count: Any, seed: str) -> list[Task]:
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MAX_TASKS:
        raise UserError(f"method random needs `run_cap`, the number of tasks, from 1 to {_MAX_TASKS}")
    draws = {name: _of_parameter(name, _drawn_settings, name, given) for name, given in parameters.items()}
    if (most := math.prod(map(most_values, parameters.values()))) < count:
        raise UserError(f"no {count} different tasks can be drawn, only {most:.0f}: lower run_cap")
    generator = random.Random(seed)
    tasks: dict[str, Task] = {}
    for _ in range(_DRAWS_PER_TASK * count):
        task = _joined([_of_parameter(name, draw, generator) for name, draw in draws.items()])
        tasks.setdefault(_identity(task), task)
        if len(tasks) == count:
            return list(tasks.values())
    raise UserError(f"no {count} different tasks can be drawn, only {len(tasks)}: lower run_cap")


def _drawn_settings(name: str, given: dict[str, Any]) -> Callable[[random.Random], Task]:
    """What draws the settings of a parameter. Listed values are checked at once: no draw need meet a wrong one."""
    if isinstance(given.get("values"), list):
        return drawn({**given, "values": [_settings(name, value) for value in given["values"]]})
    draw = drawn(given)
    return lambda generator: _settings(name, draw(generator))


def _settings(name: str, value: Any) -> Task:
    """What a value of a parameter sets, each of its type: one setting, or those of a section."""
    if name not in SECTIONS:
        return {name: checked(name, value, HINTS[name])}
    if not isinstance(value, dict) or not value:
        raise UserError(f"{name} is a section: its values hold settings, for example {{key: value}}")
    for key in value:
        _require_varied(f"{name}.{key}")
    return {f"{name}.{key}": checked(f"{name}.{key}", item, HINTS[f"{name}.{key}"]) for key, item in value.items()}


def _joined(parts: Sequence[Task]) -> Task:
    task: Task = {}
    for part in parts:
        if twice := task.keys() & part.keys():
            raise UserError(f"{min(twice)} is set by two parameters: leave it to one")
        task |= part
    return task


def _identity(value: Task) -> str:
    """The same text for tasks that are equal."""
    return json.dumps(value, sort_keys=True)
