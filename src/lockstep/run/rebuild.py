"""A W&B run made anew from a run folder: every line of metrics.jsonl once, whatever became of the live copy."""

import secrets
import shutil
from pathlib import Path
from typing import Any

import wandb

from lockstep.errors import UserError, first_line
from lockstep.lease import owner_of
from lockstep.run.folder import read_summary
from lockstep.run.history import read_history, read_starts, scalars_of
from lockstep.run.wandb import INIT_SECONDS, QUIET, Wandb, describe_run, run_id, store_run_id
from lockstep.settings.config import Config

_GOOD_ENDS = ("finished", "preempted")


def require_login() -> None:
    """Raise UserError if there is no API key: W&B would ask for one."""
    wandb.setup(wandb.Settings(**QUIET, mode="online"))
    if not wandb.login(verify=False, prompt=False):
        raise UserError(
            "W&B has no API key: run `wandb login` once, or give --offline and upload with `wandb sync` later"
        )


def rebuild_run(run_dir: Path, config: Config, *, offline: bool, as_new: bool) -> str:
    """Write all of a run to W&B; returns its address, or where it lies.

    It has the id of the live copy, which W&B must not hold already, or with `as_new` a new one, which the run keeps.
    Offline it is the one thing in `<run_dir>/wandb/rebuilt`. Raises UserError if W&B takes no such run, if the run has
    no history, or if it is being trained.
    """
    history = read_history(run_dir)
    if not history:
        raise UserError(f"{run_dir} has nothing to upload: no line of metrics.jsonl")
    if owner := owner_of(run_dir / "lease.json"):
        raise UserError(f"{run_dir} is being trained by {owner}: upload it when that has ended")
    try:
        run = _open(run_dir, config, offline, secrets.token_hex(4) if as_new else run_id(run_dir))
        try:
            place = f"wandb sync {Path(run.dir).parent}" if offline else str(run.url)
            exit_code = _fill(run, run_dir, history)
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish(exit_code=exit_code)
    except wandb.Error as error:
        wandb.teardown()  # the half-open run keeps its id taken until then
        hint = "" if offline else "; if W&B has that run already, --as_new writes another"
        raise UserError(f"W&B did not take {run_dir} ({first_line(error)}){hint}") from error
    if as_new:
        store_run_id(run_dir, run.id)
    return place


def _open(run_dir: Path, config: Config, offline: bool, identity: str) -> Any:
    place = run_dir / "wandb" / "rebuilt"
    if offline:
        shutil.rmtree(place, ignore_errors=True)  # two of them, uploaded together, would be every line twice
    place.mkdir(parents=True, exist_ok=True)
    starts = read_starts(run_dir)
    environment = starts[-1] if starts else {}
    # Not the machine, the load and the commit of the upload, which would pass for those of the training.
    quiet = {**QUIET, "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False}
    settings = wandb.Settings(
        **quiet, disable_git=True, git_commit=environment.get("git_commit"), init_timeout=INIT_SECONDS
    )
    return wandb.init(
        **describe_run(config, run_dir, environment),
        id=identity,
        resume="never",
        mode="offline" if offline else "online",
        dir=str(place),
        settings=settings,
    )


def _fill(run: Any, run_dir: Path, history: list[dict[str, Any]]) -> int:
    """Write history, figures and summary; returns the exit code that the training is known to have had."""
    copy, step = Wandb(run), 0
    for record in history:
        axes, values = scalars_of(record)
        step = int(axes.get("step", step))
        copy.scalars(step, axes, values)
    for path in sorted((run_dir / "figures").glob("*.png")):
        copy.image(step, path.stem, path)
    summary = read_summary(run_dir)
    run.summary.update(summary)
    return 0 if summary.get("state") in _GOOD_ENDS else 1
