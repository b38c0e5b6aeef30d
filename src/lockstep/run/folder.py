"""The run folder: which run a command means, whether it may go on, and its summary."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.data.sources.source import Identity
from lockstep.errors import UserError, did_you_mean
from lockstep.files import path_of, read_json, remove_unfinished, replace_file, write_json
from lockstep.launch.accelerator import Launch
from lockstep.lease import Lease
from lockstep.run.history import read_history
from lockstep.settings.cli import run_dir_of
from lockstep.settings.config import Config, changed_settings
from lockstep.settings.yaml import config_to_yaml, load_config
from lockstep.training.schedule import keeps_course

KEPT = ("micro_batch_size", "threads", "data", "origin")
"""What a run has from its first start on: samples of a microbatch, CPU threads, identity of the data, where it began"""


_LONGEST = 80
"""Letters of a source in a folder's name"""


class LostFolder(UserError):
    """The run folder was removed, or another training has it."""


@dataclass(frozen=True)
class Run:
    """A run's place on disk."""

    path: Path
    config: Config
    summary: dict[str, Any]
    """What summary.json said when the run was opened; empty for a new run"""
    old_epochs: int | None = None
    """train.epochs before, if this command makes the run longer"""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether one was saved; it may be damaged."""
        return (self.checkpoints / "last").exists()

    @property
    def micro_batch_size(self) -> int | None:
        """The one that an earlier start had: another would change batch statistics, and with them the training."""
        return _count(self.summary.get("micro_batch_size"))

    @property
    def threads(self) -> int | None:
        """CPU threads of a process at the first start: another number gives other bits."""
        return _count(self.summary.get("threads"))

    @property
    def is_finished(self) -> bool:
        return self.summary.get("state") == "finished" and self.old_epochs is None

    def describe_result(self) -> str:
        """The result of a finished run, and how to start over."""
        results = ", ".join(
            f"{name.replace('_', ' ')} {value:.2%}"
            for name, value in self.summary.items()
            if name.endswith("accuracy") and isinstance(value, float)
        )
        return (
            f"{self.path} is finished: {results}. Details: {self.path / 'summary.json'}. To train again, remove the "
            "folder, or choose another --run.name or --run.seed"
        )

    def require_same_data(self, identity: Identity, launch: Launch) -> None:
        """Raise UserError, on every process alike, with what has changed, if one has other data than the rest.

        Or if the run was begun with others: its order would move.
        """
        launch.require_alike("data", identity)
        if changes := _changes(self.summary.get("data"), identity):
            raise UserError(
                f"{self.path} was begun with other data ({changes}): bring the old data back, or choose another "
                "--run.name"
            )

    def create(self, **kept: Any) -> None:
        """Make the folder and write config.yaml, once everything that could refuse the settings has been built.

        What the first start gives in KEPT stays for all later ones.
        """
        remove_unfinished(self.path)
        replace_file(self.path / "config.yaml", config_to_yaml(self.config).encode())
        assert kept.keys() <= set(KEPT)
        self.write_summary(**(kept | {key: self.summary[key] for key in KEPT if key in self.summary}), state="running")

    @contextmanager
    def owned(self, launch: Launch) -> Iterator[Lease]:
        """Within it this training alone writes into the folder, which is made if need be.

        Raises UserError, on every process alike, if another training has it.
        """
        lease = Lease(self.path / "lease.json")
        launch.decide(lambda: self._take(lease))
        try:
            yield lease
        finally:
            lease.release()
            if launch.is_main:
                with suppress(OSError):  # where nothing has come of it
                    self.path.rmdir()
                    self.path.parent.rmdir()

    def _take(self, lease: Lease) -> None:
        if (owner := lease.take()) is not None:
            raise UserError(
                f"{self.path} is being trained by {owner}: wait for its end, ask it to stop "
                f"(touch {self.path / 'stop'}), or choose another --run.name"
            )
        if read_summary(self.path) != self.summary:
            lease.release()
            raise UserError(
                f"{self.path} was changed by another training just now: the same command goes on from there"
            )

    @contextmanager
    def failure_noted(self, launch: Launch) -> Iterator[None]:
        """Within it, an exception that ends training leaves `state: failed` in summary.json."""
        try:
            yield
        except LostFolder:
            raise  # nothing here is ours any more
        except Exception:
            if launch.is_main and (self.path / "config.yaml").is_file():
                with suppress(OSError):
                    self.write_summary(state="failed")
            raise

    def write_summary(self, **values: Any) -> None:
        """Merge values into summary.json."""
        write_json(self.path / "summary.json", {**read_summary(self.path), **values})


def has_source(path: Path, config: Config) -> bool:
    """Whether a run was trained on these data, by the name of their source; not where there is no run."""
    return (path / "config.yaml").is_file() and config.data.source == load_config(path / "config.yaml").data.source


def results_folder(path: Path, config: Config) -> Path:
    """Where the results of an evaluation go: of a run's own data into its folder, of other data into one within it."""
    if has_source(path, config) or not (path / "config.yaml").is_file():
        return path
    return path / "evaluations" / re.sub(r"[^\w.-]+", "_", config.data.source).strip("_")[-_LONGEST:]


def difference_of_data(path: Path, config: Config, identity: Identity) -> str | None:
    """A line if the classes of these data are not those that the run in `path` was trained on.

    Raises UserError if the run's own source has changed. None too for a folder without a summary.
    """
    before = read_summary(path).get("data")
    changes = _changes(before, identity)
    if changes is None or not (path / "config.yaml").is_file():
        return None
    if has_source(path, config):
        raise UserError(
            f"{config.data.source} has changed since {path} was trained ({changes}): bring the old data back, or name "
            "other data with --data.source"
        )
    if (before or {}).get("class_names") == identity["class_names"]:
        return None
    return f"note: {config.data.source} has other class names than the data of {path}: outputs are taken in their order"


def _changes(before: Any, identity: Identity) -> str | None:
    if not isinstance(before, dict) or before == identity:
        return None
    differing = [key for key, value in identity.items() if value != before.get(key)]
    return ", ".join(f"{key} {before.get(key)} -> {identity[key]}" for key in differing)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def open_run(config: Config, launch: Launch) -> Run:
    """The run that these settings name. Looks only, writes nothing.

    Raises UserError, on every process alike, if the folder belongs to other settings (with the changed keys), or if
    `run.resume` forbids what is found. The main process looks; the others are told.
    """
    return launch.decide(lambda: _look(config))


def _look(config: Config) -> Run:
    assert config.run.name is not None
    path = run_dir_of(config)
    exists = (path / "config.yaml").is_file()
    if config.run.resume == "must" and not exists:
        raise UserError(f"--run.resume=must, but there is no run in {path}")
    if config.run.resume == "never" and exists:
        raise UserError(f"--run.resume=never, but {path} exists: choose another --run.name or remove the folder")
    before = load_config(path / "config.yaml") if exists else config
    if config.run.from_run is not None and not exists:
        _require_origin(path_of(config.run.from_run), config)
    longer = _is_longer(before, config)
    if (changes := changed_settings(before, config)) and not longer:
        raise UserError(
            f"{path} holds a run with other settings ({'; '.join(changes)}): choose another --run.name, "
            "leave --run.name out to get one, or remove the folder"
        )
    return Run(path, config, read_summary(path), before.train.epochs if longer else None)


def _require_origin(run_dir: Path, config: Config) -> None:
    if not (run_dir / "config.yaml").is_file():
        known = [str(path.parent) for path in run_dir.parent.glob("*/config.yaml")]
        raise UserError(f"--run.from_run={run_dir}: there is no run.{did_you_mean(str(run_dir), known)}")
    if not (run_dir / "checkpoints" / "last").exists():
        raise UserError(f"--run.from_run={run_dir}: that run has no checkpoint yet")
    if (name := load_config(run_dir / "config.yaml").optim.name) != config.optim.name:
        raise UserError(
            f"--run.from_run={run_dir} brings the state of --optim.name={name}, not of {config.optim.name}: set that, "
            f"or take the weights alone, with --model.checkpoint={run_dir}"
        )


def _is_longer(before: Config, config: Config) -> bool:
    """Whether these settings ask for the same training with more epochs, as if they had been asked for at first.

    Raises UserError if the epochs that are over would have been others then.
    """
    epochs, more = before.train.epochs, config.train.epochs
    as_before = replace(config, train=replace(config.train, epochs=epochs))
    if more <= epochs or changed_settings(before, as_before):
        return False
    cause = ""
    if not keeps_course(config.schedule, epochs, more):
        cause = f"--schedule.name={config.schedule.name} lays its learning rates out over all epochs"
    elif before.train.max_steps is not None:
        cause = f"it ends with --train.max_steps={before.train.max_steps}"
    elif _was_validated(run_dir_of(config), epochs) and epochs < before.train.best_from_epoch:
        cause = f"its end counted as the best before epoch {before.train.best_from_epoch} (--train.best_from_epoch)"
    elif _was_validated(run_dir_of(config), epochs) and epochs % before.train.validate_every_epochs:
        cause = f"its last validation, after epoch {epochs}, would not have been one"
    if cause:
        raise UserError(
            f"{run_dir_of(config)} cannot be made longer, from {epochs} to {more} epochs, for {cause}: go on from it "
            f"as a new run, with --run.from_run={run_dir_of(config)} and another --run.name"
        )
    return True


def _was_validated(run_dir: Path, epoch: int) -> bool:
    """Whether there was a validation after this epoch: not yet, it may be, or never, without a validation set."""
    return any(line.get("split") == "val" and line.get("epoch") == epoch for line in read_history(run_dir))


def read_summary(path: Path) -> dict[str, Any]:
    """What summary.json says; empty if there is none that says anything. Raises UserError if it is no file."""
    try:
        summary = read_json(path / "summary.json")
    except UserError:
        raise
    except (FileNotFoundError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
