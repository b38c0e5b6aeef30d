"""Copies of a run in the trackers that Accelerate knows by name: MLflow, trackio, Comet and others get the scalars."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from lockstep.errors import UserError, did_you_mean
from lockstep.run.exhibit import Exhibit
from lockstep.settings.config import Config, plain_settings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

_RUN_NAME = {"mlflow": "run_name", "trackio": "name", "swanlab": "experiment_name", "clearml": "task_name"}
"""What each calls the name of a run; the first argument is the project's for all"""
_OURS = ("wandb", "tensorboard")


def require_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that Accelerate does not know, or whose package is not installed."""
    known = sorted(LOGGER_TYPE_TO_CLASS.keys() - set(_OURS))
    for name in names:
        if name in _OURS:
            raise UserError(f"--log.trackers={name}: it has a setting of its own, --log.{name}")
        if name not in known:
            raise UserError(f"--log.trackers={name}: Accelerate knows {', '.join(known)}.{did_you_mean(name, known)}")
        if name in LoggerType.list() and name not in map(str, get_available_trackers()):  # others were registered
            raise UserError(f"--log.trackers={name}: its package is not installed: pip install {name}")


class AccelerateTracker:
    """A sink: see `tracker.Sink`. Each start of a training is a run of its own there."""

    def __init__(self, name: str, config: Config, run_dir: Path) -> None:
        self.name = name
        tracker = LOGGER_TYPE_TO_CLASS[name]
        place = [str(run_dir)] if tracker.requires_logging_directory else []
        named = {_RUN_NAME[name]: run_dir.resolve().name} if name in _RUN_NAME else {}
        self._tracker = tracker(config.log.project, *place, **named)
        self._tracker.start()
        self._tracker.store_init_configuration(plain_settings(config))

    def scalars(self, step: int, axes: dict[str, float], values: dict[str, float]) -> None:
        self._tracker.log(values, step=step)

    def histogram(self, step: int, name: str, values: "np.ndarray") -> None:
        """Only scalars are the same for all trackers."""

    def image(self, step: int, name: str, path: Path) -> None:
        """As above."""

    def text(self, step: int, name: str, text: str) -> None:
        """As above."""

    def graph(self, model: "nn.Module", images: "torch.Tensor") -> None:
        """As above."""

    def exhibit(self, step: int, name: str, item: Exhibit) -> None:
        """As above."""

    def alert(self, title: str, text: str) -> None:
        """As above."""

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        self._tracker.finish()
