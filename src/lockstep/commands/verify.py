"""Recompute a part of a run and compare it bit by bit: `lockstep verify RUN [--step N]`.

Training starts anew from the checkpoint before step N (or from the beginning), with the run's own settings, in a folder
beside it, until step N; then the digests of every line between are compared. On any number of processes:
`accelerate launch [options] -m lockstep verify RUN --step N`.
"""

import argparse
import itertools
import math
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.files import write_json
from lockstep.launch.accelerator import leave_group
from lockstep.launch.numerics import describe_changes
from lockstep.lease import Lease
from lockstep.run.checkpoint import folder_of, saved_steps
from lockstep.run.folder import KEPT, read_summary
from lockstep.run.history import ENVIRONMENT, HISTORY, compare_histories, read_history, read_starts
from lockstep.settings.cli import RECIPES, parse_config
from lockstep.settings.yaml import config_to_yaml


@dataclass(frozen=True)
class Plan:
    """What is recomputed, and where."""

    run: Path
    first: int
    """The step of the checkpoint from which training goes on; 0: from the beginning"""
    last: int
    arguments: list[str]
    """train.py's"""

    @property
    def folder(self) -> Path:
        """A run folder beside the run, removed in the end."""
        return self.run.with_name(f"{self.run.name}-verify-{self.last}")


def plan_of(run: Path, step: int | None) -> Plan:
    """How to recompute up to `step` (default: the last one logged); raises UserError if the run cannot tell."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"there is no run in {run}")
    logged = [line["step"] for line in read_history(run) if "digest" in line]
    last = step if step is not None else max(logged, default=0)
    if last not in logged:
        near = sorted(logged, key=lambda other: abs(other - last))[:2]
        hint = f"the nearest are {' and '.join(map(str, sorted(near)))}" if near else "none has one"
        raise UserError(f"{run} has no line with a digest for step {last}: {hint}")
    first = max((saved for saved in saved_steps(run / "checkpoints") if saved < last), default=0)
    arguments = ["--config", str(run / "config.yaml"), *_numerics_of_stretch(run, first, last)]
    arguments += [f"--train.max_steps={last}", "--run.resume=auto", "--checkpoint.every_steps=null"]
    arguments += ["--log.wandb=disabled", "--log.tensorboard=false", "--log.figures=false"]
    plan = Plan(run, first, last, arguments)
    return Plan(run, first, last, [*arguments, f"--run.root={plan.folder.parent}", f"--run.name={plan.folder.name}"])


def _starts_of_stretch(run: Path, first: int, last: int) -> list[dict[str, Any]]:
    """The starts whose lines for steps after `first`, up to `last`, are in the run's history."""
    starts, end, found = read_starts(run), math.inf, []
    for start in reversed(starts):  # each cut what those before it had written after its own beginning
        begin = start.get("step", 0)
        if max(begin, first) < min(end, last):
            found.append(start)
        end = min(end, begin)
    return found[::-1]


def _numerics_of_stretch(run: Path, first: int, last: int) -> list[str]:
    """The flags for what these steps were computed with; raises UserError if it was not one thing."""
    starts = _starts_of_stretch(run, first, last)
    for before, after in itertools.pairwise(starts):
        if changes := describe_changes(before.get("numerics", {}), after.get("numerics", {})):
            raise UserError(
                f"steps {first + 1} to {last} of {run} were made in two ways ({changes} after step {after['step']}): "
                "choose another --step"
            )
    if not starts:
        return []
    numerics = starts[-1].get("numerics", {})
    flags = [f"--runtime.precision={starts[-1].get('precision', 'launch')}"]
    return flags + [
        f"--runtime.{key}={str(numerics[key]).lower()}" for key in ("threads", "exact", "compile") if key in numerics
    ]


def _take(plan: Plan) -> Lease:
    """The right to make the folder; raises UserError if somebody has it, or if there is one that is not verify's."""
    if plan.folder.exists() and read_summary(plan.folder).get("verifies") != str(plan.run):
        raise UserError(f"{plan.folder} exists: verify would make and remove it; rename it")
    lease = Lease(plan.folder.with_name(f".{plan.folder.name}.lease.json"))
    if (owner := lease.take()) is not None:
        raise UserError(f"{plan.run} is being verified up to step {plan.last} by {owner}")
    return lease


def prepare(plan: Plan) -> None:
    """Make the folder as the run was at its checkpoint."""
    shutil.rmtree(plan.folder, ignore_errors=True)
    checkpoints = plan.folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (plan.folder / "config.yaml").write_text(config_to_yaml(parse_config(plan.arguments)))
    for name in ("split.json", HISTORY, ENVIRONMENT):
        if (plan.run / name).is_file():
            shutil.copyfile(plan.run / name, plan.folder / name)
    kept = {key: value for key, value in read_summary(plan.run).items() if key in KEPT}
    write_json(plan.folder / "summary.json", {"state": "running", **kept, "verifies": str(plan.run)})
    best = plan.run / "checkpoints" / "best"
    chosen = {"last": folder_of(plan.run / "checkpoints", plan.first)} if plan.first else {}
    chosen |= {"best": best.resolve()} if best.exists() and plan.first else {}
    for link, folder in chosen.items():
        shutil.copytree(folder, checkpoints / folder.name, dirs_exist_ok=True)
        (checkpoints / link).symlink_to(folder.name)
    for saved in saved_steps(checkpoints):
        if saved > plan.first:  # the best one came later: it must not be what training goes on from
            shutil.rmtree(folder_of(checkpoints, saved))
            (checkpoints / "best").unlink(missing_ok=True)


def verdict_of(plan: Plan) -> tuple[bool, str]:
    """Whether what was recomputed is what the run had, and a line that says so."""
    lines = [
        [line for line in read_history(folder) if "digest" in line and plan.first < line["step"] <= plan.last]
        for folder in (plan.run, plan.folder)
    ]
    verdict = compare_histories(*lines)
    what = f"steps {plan.first + 1} to {plan.last} of {plan.run}"
    if verdict == f"equal to the last bit through step {plan.last}":
        return True, f"{what}, recomputed here: equal to the last bit"
    starts = _starts_of_stretch(plan.run, plan.first, plan.last) or [{}]
    then, now = (start.get("numerics", {}) for start in (starts[-1], read_starts(plan.folder)[-1]))
    return False, f"{what}, recomputed here: {verdict}; numerics {describe_changes(then, now) or 'are the same'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Recompute, print the verdict, and return 0 if all is equal, else 1."""
    parser = argparse.ArgumentParser(prog="lockstep verify", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, runs/NAME")
    parser.add_argument("--step", type=int, metavar="N", help="a step with a line in metrics.jsonl; default: the last")
    options = parser.parse_args(arguments)
    run = options.run if options.run.name not in ("", "..") else options.run.resolve()
    plan = plan_of(run, options.step)
    is_main = os.environ.get("RANK", "0") == "0"
    lease = _take(plan) if is_main else None
    try:
        if is_main:
            prepare(plan)
        _train(plan.arguments)
        if is_main:
            equal, line = verdict_of(plan)
            print(f"{line} ({plan.folder} is removed again)")
            return 0 if equal else 1
        return 0
    finally:
        if lease is not None:
            shutil.rmtree(plan.folder, ignore_errors=True)
            lease.release()


def _train(arguments: list[str]) -> None:
    """Train as train.py does with these arguments; processes meet in it."""
    program = str(RECIPES.parent / "train.py")
    sys.argv = [program, *arguments]  # which the run folder keeps
    runpy.run_path(program, run_name="train")["train"](parse_config(arguments))
    leave_group()
