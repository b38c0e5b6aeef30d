"""Write runs to W&B anew, each from its run folder: `lockstep upload RUN [RUN ...]`.

RUN is a run folder, a folder of run folders, or a glob in quotes. For runs whose W&B copy was offline, broke, or has
several offline parts, of which W&B loses lines or shows them twice: every line of metrics.jsonl becomes one point, with
the names, settings and tags of live logging; figures and summary come along. Nothing of the run folder but its wandb/
is changed.

The W&B run has the id in wandb/run_id. Online, an id that W&B holds already is refused, for W&B can add to a run but
not replace it: --as_new takes another id, and the older run is yours to delete. Offline nobody can know: upload one of
the offline run folders, never two of the same id.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.errors import UserError
from lockstep.report.comparison import find_runs
from lockstep.settings.yaml import load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Upload, or write an offline run for each; 1 if one of them could not be."""
    options = _parser().parse_args(arguments)
    folders = find_runs(options.runs)
    from lockstep.run.rebuild import require_login

    if not options.offline:
        require_login()
    failures = 0
    for folder in folders:
        try:
            print(f"{folder}: {_upload(folder, options)}")
        except UserError as mistake:  # of one run: the others are uploaded all the same
            print(f"error: {mistake}", file=sys.stderr)
            failures += 1
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep upload", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, folders of them, globs in quotes")
    parser.add_argument("--project", help="W&B project; default: each run's --log.project")
    parser.add_argument(
        "--offline", action="store_true", help="write wandb/rebuilt/, for `wandb sync`; no login needed"
    )
    parser.add_argument("--as_new", action="store_true", help="take a new id, which the run then keeps")
    return parser


def _upload(folder: Path, options: argparse.Namespace) -> str:
    from lockstep.run.rebuild import rebuild_run

    if not (folder / "config.yaml").is_file():
        raise UserError(f"there is no run in {folder}")
    config = load_config(folder / "config.yaml")
    if options.project:
        config = replace(config, log=replace(config.log, project=options.project))
    return rebuild_run(folder, config, offline=options.offline, as_new=options.as_new)
