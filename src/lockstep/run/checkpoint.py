"""Checkpoints that are complete or not there: save, verify, find, load, prune.

A checkpoint is a folder `step_<8 digits>`. It is written aside, flushed to the disk, described by a manifest of
checksums and only then renamed, so that a folder with a step's name is whole. Older ones go after that. Weights are
safetensors; the optimizer's state is read with `weights_only=True`, so nothing pickled is ever executed.
"""

import contextlib
import errno
import io
import json
import logging
import os
import pickle
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lockstep.errors import UserError
from lockstep.files import MANIFEST, checksum, flush, manifest_problem, path_of, read_json, write_manifest
from lockstep.launch.accelerator import Launch
from lockstep.launch.sharding import is_sharded, part_of, whole
from lockstep.models.weights import load_weights, put_weights
from lockstep.run.folder import Run
from lockstep.settings.config import CheckpointConfig
from lockstep.settings.yaml import config_to_yaml
from lockstep.training.ema import ExponentialAverage
from lockstep.training.progress import Origin, Progress

_logger = logging.getLogger(__name__)

_ALWAYS_THERE = ("config.yaml", "model.safetensors", "optimizer.pt", "progress.json")
_COPIED = ("config.yaml", "model.safetensors", "ema.safetensors", "progress.json")
BEST_COPY = "best_copy"


@dataclass
class State:
    """Everything that training needs to go on, as tensors on the CPU and plain values."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    ema: dict[str, Tensor] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


class Checkpointer:
    """Saves and restores the parts of a training run. Only the main process writes.

    The loop waits for the copy to the host's memory, not for the disk: one save at a time runs in a thread.
    """

    def __init__(
        self,
        run: Run,
        launch: Launch,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        average: ExponentialAverage | None,
    ) -> None:
        """`model` is the bare network, `optimizer` the prepared one."""
        self._run, self._launch, self._accelerator = run, launch, accelerator
        self._model, self._optimizer, self._average = model, optimizer, average
        # Once: 2.5 ms of Python, during which the loop would wait for the interpreter at every save.
        self._config_yaml = config_to_yaml(run.config)
        # With one OpenMP thread: of the several that its first large operation would begin, those of the loop, too many
        # for the cores from then on, would sleep between operations (quick start, two cores: 2,900 -> 1,250 images/s).
        # Threads that are there keep theirs, later ones have one, too. torch's thread that pins memory does the same.
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=torch.set_num_threads, initargs=(1,))
        self._pending: Future[None] | None = None

    def restore(self, folder: Path | None) -> Progress:
        """Put a checkpoint of `find_checkpoint` into the parts; returns its progress.

        If there is none, a new one, after what `run.from_run` brings was put into them.
        """
        if folder is None:
            origin = self._run.config.run.from_run
            return Progress() if origin is None else Progress(origin=self._begin_from(path_of(origin)))
        state = load_checkpoint(folder, verify=False)
        self._put(state, folder)
        progress = _as_progress(state.progress, folder)
        is_best = progress.best_step == progress.step or not (progress.best_step or progress.validations)
        if self._launch.is_main and is_best:
            point(self._run.checkpoints, "best", folder)  # in case a kill came between the save and this link
            copy_best(self._run.checkpoints)
        progress.restarts += 1
        return progress

    def _begin_from(self, run_dir: Path) -> Origin:
        """Put the newest state of another run into the parts, with the settings of this one."""
        origin = self._launch.decide(lambda: find_origin(run_dir, self._run))
        state = load_checkpoint(run_dir / "checkpoints" / origin["checkpoint"], verify=False)
        pairs = zip(self._optimizer.state_dict()["param_groups"], state.optimizer["param_groups"], strict=False)
        # lamb and adan count their steps in the groups: what only the origin has stays
        groups = [{**given, **own, "params": given["params"]} for own, given in pairs]
        ema = state.ema or state.model  # an average that begins here begins with these weights
        self._put(replace(state, optimizer={**state.optimizer, "param_groups": groups}, ema=ema), run_dir)
        parts = "weights, average and optimizer" if state.ema and self._average is not None else "weights and optimizer"
        self._launch.say(f"beginning with the {parts} of {run_dir}, {origin['checkpoint']}")
        return origin

    def _put(self, state: State, source: Path) -> None:
        put_weights(self._model, state.model, str(source))
        try:
            put_optimizer_state(self._optimizer, state.optimizer)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as misfit:
            raise UserError(
                f"checkpoint {source} cannot be used: its optimizer.pt is another's ({misfit!r})"
            ) from misfit
        if self._average is not None:
            self._average.load_state_dict(state.ema)
        if self._accelerator.scaler is not None and state.scaler:
            self._accelerator.scaler.load_state_dict(state.scaler)

    def load_best(self) -> None:
        """Wait for the last save and put the best weights (their average, if there is one) into the network.

        Their copy steps in if they are damaged. Raises UserError if both are.
        """
        self.wait(must_succeed=True)
        self._accelerator.wait_for_everyone()
        best = self._launch.decide(lambda: find_best(self._run.checkpoints))
        put_weights(self._model, load_weights(best, verify=False), str(best))

    def save(self, progress: Progress, *, is_best: bool) -> None:
        """Save the present state as `last`, and as `best` if it is; reports a failed earlier save."""
        is_main = self._accelerator.is_main_process
        if not is_main and not is_sharded(self._model):
            return
        self.wait()
        state = self._capture(progress)
        if not is_main or (not is_best and problem_with(folder_of(self._run.checkpoints, progress.step)) is None):
            return  # this very state was saved before, perhaps by the start before this one
        self._pending = self._thread.submit(self._write, progress.step, state, is_best)

    def wait(self, *, must_succeed: bool = False) -> None:
        """Wait for the save in flight. A failed one is a warning, or a UserError if none will follow."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except UserError as problem:
            if must_succeed:
                raise
            _logger.warning("%s; training goes on without this checkpoint", problem)

    def _capture(self, progress: Progress) -> State:
        """A copy of the present state; every process must take part if the network is sharded."""
        scaler = self._accelerator.scaler
        average = {} if self._average is None else self._average.state_dict()
        return State(
            model=_on_host(self._model.state_dict()),
            optimizer=_on_host(self._optimizer.state_dict()),
            progress=progress.as_dict(),
            ema=_on_host(average),
            scaler={} if scaler is None else scaler.state_dict(),
        )

    def _write(self, step: int, state: State, is_best: bool) -> None:
        checkpoints = self._run.checkpoints
        for name, weights in state.model.items():
            if not weights.isfinite().all():
                raise UserError(f"cannot save a checkpoint of step {step}: {name} is not finite")
        folder = save_checkpoint(checkpoints, step, state, self._config_yaml)
        with _explained(checkpoints):
            if is_best:
                point(checkpoints, "best", folder)
                copy_best(checkpoints)
            prune(checkpoints, self._run.config.checkpoint)


def _as_progress(values: dict[str, Any], folder: Path) -> Progress:
    try:
        progress = Progress.from_dict(values)
        if folder_of(folder.parent, progress.step) != folder:
            raise ValueError(f"it is that of step {progress.step}")
        return progress
    except (KeyError, TypeError, ValueError) as problem:
        line = f"checkpoint {folder} cannot be used: its progress.json is another version's ({problem!r})"
        raise UserError(line) from problem


def _on_host(value: Any) -> Any:
    """A copy of a state dict in the host's memory, so that training may go on changing the original."""
    if isinstance(value, Tensor):
        return whole(value.detach()).to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return checkpoints / f"step_{step:08d}"


def save_checkpoint(checkpoints: Path, step: int, state: State, config_yaml: str) -> Path:
    """Write the state of a step and point `last` at it; returns its folder.

    Raises UserError, in one line, if the disk is full or cannot be written; nothing half written remains.
    """
    final = folder_of(checkpoints, step)
    aside = checkpoints / f".tmp_{final.name}"
    with _explained(checkpoints):
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            _write_files(aside, state, config_yaml)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            flush(checkpoints)
            point(checkpoints, "last", final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return final


@contextlib.contextmanager
def _explained(checkpoints: Path) -> Iterator[None]:
    """Turns an error of the disk into one line for the user."""
    try:
        yield
    except OSError as problem:
        reason = "the disk is full" if problem.errno == errno.ENOSPC else str(problem)
        raise UserError(f"cannot save a checkpoint in {checkpoints}: {reason}") from problem


def _write_files(folder: Path, state: State, config_yaml: str) -> None:
    # By way of memory, because the writers of both libraries hide a full disk behind errors of their own.
    (folder / "model.safetensors").write_bytes(_as_safetensors(state.model))
    if state.ema:
        (folder / "ema.safetensors").write_bytes(_as_safetensors(state.ema))
    rest = io.BytesIO()
    torch.save({"optimizer": state.optimizer, "scaler": state.scaler}, rest)
    (folder / "optimizer.pt").write_bytes(rest.getbuffer())
    (folder / "progress.json").write_text(json.dumps(state.progress, indent=1))
    (folder / "config.yaml").write_text(config_yaml)
    write_manifest(folder)


def _as_safetensors(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def point(checkpoints: Path, name: str, target: Path) -> None:
    """Make the link `name` (best, last) lead to a checkpoint, in one step."""
    aside = checkpoints / f".tmp_{name}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name)
    place = checkpoints / name
    if place.is_dir() and not place.is_symlink():  # a run that was copied without its links
        place.rename(checkpoints / f".tmp_{name}_{secrets.token_hex(4)}")
    aside.replace(place)


def copy_best(checkpoints: Path) -> None:
    """Copy what `best` leads to, but for the optimizer: of these weights there is no other, and they are the result."""
    aside, place = checkpoints / f".tmp_{BEST_COPY}", checkpoints / BEST_COPY
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in _COPIED:
        if (checkpoints / "best" / name).is_file():
            shutil.copyfile(checkpoints / "best" / name, aside / name)
    write_manifest(aside)
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)


def find_best(checkpoints: Path) -> Path:
    """The best checkpoint, or its copy if it is damaged, with a warning; raises UserError if both are."""
    best, copy = checkpoints / "best", checkpoints / BEST_COPY
    problem = problem_with(best)
    if problem is None:
        return best
    if manifest_problem(copy, ("model.safetensors", "progress.json")) is not None:
        raise UserError(f"checkpoint {best} cannot be used: {problem}; nor can its copy {copy}")
    _logger.warning("checkpoint %s is damaged (%s): using %s", best, problem, copy)
    return copy


def problem_with(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as the manifest says."""
    return manifest_problem(folder, _ALWAYS_THERE)


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps with a checkpoint folder, ascending."""
    return sorted(int(path.name[5:]) for path in checkpoints.glob("step_" + "[0-9]" * 8) if path.is_dir())


def find_checkpoint(run: Run, launch: Launch) -> Path | None:
    """The checkpoint from which training goes on, if there is one: the main process finds it, and tells the others."""
    return launch.decide(lambda: find_newest(run.checkpoints))


def find_origin(run_dir: Path, run: Run) -> Origin:
    """What `run.from_run` leads to; raises UserError if there is nothing, or another state than at the first start."""
    newest = find_newest(run_dir / "checkpoints")
    if newest is None:
        raise UserError(f"--run.from_run={run_dir}: that run has no checkpoint that can be used")
    origin = {"run": str(run_dir), "checkpoint": newest.name, "manifest": checksum(newest / MANIFEST)}
    before = run.summary.get("origin", origin)
    if before != origin:
        raise UserError(
            f"{run.path} began with {before.get('checkpoint')} of {run_dir}, whose newest checkpoint is another now, "
            f"{newest.name}: choose another --run.name, or remove {run.path}"
        )
    return origin


def find_newest(checkpoints: Path) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are reported, and left where they are."""
    for step in reversed(saved_steps(checkpoints)):
        folder = folder_of(checkpoints, step)
        problem = problem_with(folder)
        if problem is None:
            return folder
        _logger.warning("checkpoint %s is damaged (%s): using the one before it", folder, problem)
    return None


def verify_checkpoint(folder: Path) -> None:
    """Raise UserError if a checkpoint is missing or damaged, naming it and what is wrong."""
    if problem := problem_with(folder):
        raise UserError(f"checkpoint {folder} cannot be used: {problem}")


def load_checkpoint(folder: Path, *, verify: bool = True) -> State:
    """Read a checkpoint onto the CPU; raises UserError naming it if it is missing or damaged."""
    if verify:
        verify_checkpoint(folder)
    ema = folder / "ema.safetensors"
    try:
        rest = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as refusal:
        raise UserError(f"checkpoint {folder} cannot be used: optimizer.pt holds more than tensors") from refusal
    try:
        return State(
            model=load_file(folder / "model.safetensors"),
            optimizer=rest["optimizer"],
            scaler=rest["scaler"],
            progress=read_json(folder / "progress.json"),
            ema=load_file(ema) if ema.is_file() else {},
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as damage:
        raise UserError(f"checkpoint {folder} cannot be used: {damage!r}") from damage


def put_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, whole as checkpoints have it; a sharded optimizer takes its part.

    The kernel stays that of `optimizer`: what is fused on one device need not be on another.
    """
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [saved | {key: own[key] for key in ("fused",) if key in own} for saved, own in pairs]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if not isinstance(value, bool | int | float) and value.shape == parameter.shape:  # as timm's Muon keeps
                kept[name] = part_of(value, parameter)


def prune(checkpoints: Path, config: CheckpointConfig) -> None:
    """Remove what `config` does not keep, but for the checkpoint that `best` leads to; also half-written ones.

    Newest means up to `last`: later ones are damaged, or `last` would lead to them, and do not count.
    """
    best, last = checkpoints / "best", checkpoints / "last"
    _remove_strays(checkpoints)
    steps = saved_steps(checkpoints)
    folders = [folder_of(checkpoints, step) for step in steps]
    kept = [folder for folder in folders if not last.is_symlink() or folder.name <= os.readlink(last)]
    kept = kept[-config.keep_last :]
    if best.is_symlink():
        kept.append(checkpoints / os.readlink(best))
    if config.keep_every_steps:
        kept += [folder_of(checkpoints, step) for step in steps if step % config.keep_every_steps == 0]
    for folder in folders:
        if folder not in kept:
            # Under another name first: a kill during removal must not leave a folder that looks whole.
            folder.rename(checkpoints / f".tmp_{folder.name}")
    _remove_strays(checkpoints)


def _remove_strays(checkpoints: Path) -> None:
    for stray in checkpoints.glob(".tmp_*"):
        if stray.is_symlink():
            stray.unlink()
        else:
            shutil.rmtree(stray, ignore_errors=True)
