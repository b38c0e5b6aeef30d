"""Sweeps of W&B's form, without a W&B server.

  lockstep sweep list FILE                                      the tasks
  lockstep sweep run FILE INDEX [train.py's arguments]          become train.py for one of them
  lockstep sweep run FILE [--jobs N] [--processes K] [...]      train all here, compare them, draw them

`run FILE` trains one task after the other, or N at once; each is a process of its own (with --processes an `accelerate
launch` of K). The same command goes on where the last one ended, and leaves out what is finished. `early_terminate` of
the file (hyperband) is followed. Logs, the table and the figure are in <run.root>/sweep_<FILE's name>/.

`run FILE INDEX` may stand where train.py does: `accelerate launch -m lockstep sweep run FILE 3`. Each task is a run of
its own, as train.py names it, in the W&B group of its job array (or of the file).
"""

import argparse
import os
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.errors import UsageError, UserError, print_line
from lockstep.settings.cli import RECIPES
from lockstep.sweep.file import Sweep, read_sweep, spelled


def main(arguments: Sequence[str] | None = None) -> int:
    """List a sweep's tasks, become train.py for one of them, or train all; returns the exit code."""
    # No abbreviations: the rest is train.py's.
    parser = argparse.ArgumentParser(prog="lockstep sweep", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {"list": "print the tasks", "run": "train one task, or all"}.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("file", type=Path, metavar="FILE")
        if name == "run":
            command.usage = "lockstep sweep run FILE [INDEX] [--jobs N] [--processes K] [train.py's arguments]"
            command.add_argument("--jobs", type=_count, metavar="N", help="tasks at once (default: 1)")
            command.add_argument("--processes", type=_count, metavar="K", help="processes of each task (default: 1)")
    options, more = parser.parse_known_args(arguments)
    try:
        sweep = read_sweep(options.file)
        if options.command == "list":
            return _list(sweep)
        if more and re.fullmatch(r"-?\d+", more[0]):
            if options.jobs or options.processes:
                raise UserError("--jobs and --processes are for all tasks: leave them out, or the INDEX")
            return _become_train(sweep.arguments_of(int(more[0]), more[1:]))
        return _train_all(sweep, more, options.jobs or 1, options.processes or 1)
    except UserError as mistake:
        raise UsageError(str(mistake)) from mistake


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def _list(sweep: Sweep) -> int:
    for index, task in enumerate(sweep.tasks):
        print_line(f"{index}: {' '.join(spelled(task))}")
    print(f"sbatch --array=0-{len(sweep.tasks) - 1} slurm/array_sweep.sbatch {sweep.path}", file=sys.stderr)
    return 0


def _become_train(arguments: list[str]) -> int:
    program = str(RECIPES.parent / "train.py")
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
    return 0


def _train_all(sweep: Sweep, more: Sequence[str], jobs: int, processes: int) -> int:
    from lockstep.sweep.results import as_table, draw_comparison, folder_of, plan_runs, ranked, read_result, write_table

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a launcher started several processes, each of which would train all tasks: use --processes")
    runs = plan_runs(sweep, more)  # mistakes are found before torch is imported
    from lockstep.sweep.command import command_of
    from lockstep.sweep.runner import Runner

    runner = Runner(sweep, runs, lambda run: command_of(sweep, run, more, jobs, processes), jobs)
    code = runner.run()
    failed = {failure.run.index: f"failed, code {failure.code}" for failure in runner.failures}
    found = [read_result(run, sweep.metric, runner.stops) for run in runs]
    results = ranked([replace(one, state=failed.get(one.run.index, one.state)) for one in found], sweep.metric)
    folder = folder_of(sweep, runs[0].config)
    print_line(as_table(results, sweep.metric))
    write_table(results, sweep.metric, folder / "results.csv")
    if draw_comparison(runs, folder / "comparison.png"):
        print_line(f"curves of all: {folder / 'comparison.png'}; this table: {folder / 'results.csv'}")
    for failure in runner.failures:
        print(failure, file=sys.stderr)
    return code
