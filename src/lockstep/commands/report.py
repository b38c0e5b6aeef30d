"""Write a run's page, report.html, anew: `lockstep report RUN [RUN ...]`.

From what the run folder holds, its curves drawn again: also of a run that was stopped, failed, or still trains, and
after `eval.py` drew more. Needs no data and no network.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lockstep.errors import UserError, print_line
from lockstep.report.comparison import find_runs
from lockstep.report.figures import plot_curves
from lockstep.report.run_page import write_run_page
from lockstep.run.history import read_history


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of each run, and say where it is."""
    parser = argparse.ArgumentParser(prog="lockstep report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, folders of them, globs in quotes")
    for run in find_runs(parser.parse_args(arguments).runs):
        print_line(str(_write(run)))
    return 0


def _write(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        raise UserError(f"there is no run in {run}")
    if history := read_history(run):
        plot_curves(history, run / "figures" / "curves.png")
    return write_run_page(run)
