"""Checks of where results go: the disk, and W&B."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import psutil
import torch

from lockstep.checks.finding import Finding, Parts
from lockstep.errors import first_line
from lockstep.run.checkpoint import saved_steps
from lockstep.settings.cli import run_dir_of
from lockstep.training.learner import Learner

WANDB_SECONDS = 10


def check_disk(parts: Parts) -> Finding | None:
    """The run folder's place can be written to and has room for the checkpoints to come."""
    if not parts.is_main:
        return None
    config = parts.config
    checkpoints = run_dir_of(config) / "checkpoints"
    place = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        reason = f"{place} cannot be written to ({problem.strerror or problem})"
        return Finding("failed", f"{reason}: set another --run.root, or make it a folder of yours with room")
    free = shutil.disk_usage(place).free
    if parts.learner is None:
        return Finding("ok", f"{place} can be written to; {_size(free)} free (without a network no need is known)")
    # The newest ones, the best one, and the one being written; those there already will make room for new ones.
    count = max(1, config.checkpoint.keep_last + 2 - len(saved_steps(checkpoints)))
    each = _checkpoint_bytes(parts.learner)
    folders = f"{count} checkpoint{'s' * (count > 1)} of {_size(each)}"
    text = f"{folders} need {_size(count * each)}; {place} has {_size(free)} free"
    if count * each > free:
        return Finding("failed", f"{text}: make room, set another --run.root, or lower --checkpoint.keep_last")
    return Finding("ok", text)


def _checkpoint_bytes(learner: Learner) -> int:
    model, optimizer, average = learner.model, learner.optimizer, learner.average
    if not optimizer.state:  # no step was possible: zero gradients make the same state
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    tensors = [*model.state_dict().values(), *(average.state_dict() if average else {}).values()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def check_wandb(parts: Parts) -> Finding | None:
    """What W&B will do: nothing, log here, or log to its server, which must answer and know the API key."""
    if not parts.is_main:
        return None
    wanted = parts.config.log.wandb
    if wanted == "disabled":
        return Finding("ok", "disabled by --log.wandb")
    import wandb

    forced: dict[str, Any] = {} if wanted == "auto" else {"mode": wanted}
    try:
        settings = wandb.setup(wandb.Settings(silent=True, console="off", **forced)).settings
        if settings.mode in ("disabled", "offline", "dryrun"):
            source = f"--log.wandb={wanted}" if forced else "the environment or `wandb offline`"
            return Finding("ok", f"{'disabled' if settings.mode == 'disabled' else 'offline'} by {source}")
        if not wandb.login(verify=False, prompt=False):  # never a question
            text = "no API key: the run will be logged offline; run `wandb login` once to log online"
            return Finding("ok" if wanted == "auto" else "warning", text)
        user = wandb.Api(timeout=WANDB_SECONDS).viewer.username
        return Finding("ok", f"online at {settings.base_url} as {user}, project {parts.config.log.project}")
    except Exception as problem:
        text = f"the server does not accept us ({first_line(problem)}): the run will be logged offline"
        return Finding("warning", f"{text}; look at the network, or run `wandb login` again")
    finally:
        _end_wandb(wandb.teardown)


def _end_wandb(teardown: Callable[[], object]) -> None:
    """End W&B's own process. Seen: one that did not end, for which W&B waits without limit."""
    leaving = threading.Thread(target=teardown, daemon=True)
    leaving.start()
    leaving.join(WANDB_SECONDS)
    if leaving.is_alive():
        for child in psutil.Process().children():
            if "wandb" in child.name():
                child.kill()
        leaving.join(WANDB_SECONDS)
