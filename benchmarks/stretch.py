"""Stretches of train.py's own loop, without log lines, validations and saves, for tests and measurements.

with prepared("--model.name=tiny_cnn") as training:
    stretch(training, steps=20)
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("--log.wandb=disabled", "--log.tensorboard=false", "--log.figures=false", "--run.name=stretch")


def program() -> Any:
    """train.py as a module."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import train

    return train


@contextmanager
def prepared(*settings: str) -> Iterator[Any]:
    """What train.py builds for these settings, in a folder that is removed afterwards."""
    from lockstep.launch.accelerator import build_accelerator
    from lockstep.run.folder import open_run
    from lockstep.settings.cli import parse_config

    with tempfile.TemporaryDirectory() as folder:
        config = parse_config([*SETTINGS, f"--run.root={folder}", f"--data.cache_dir={folder}/cache", *settings])
        accelerator, launch = build_accelerator(config.runtime)
        nobody: Any = None  # who holds the run folder counts at milestones only
        unstopped: Any = _Limit(0)
        yield program().begin(open_run(config, launch), nobody, accelerator, launch, unstopped)


class Enough(Exception):
    """The steps are done."""


class _Limit:
    """In the place of preemption.Preemption: ends the loop after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def at_once(self) -> AbstractContextManager[None]:
        return nullcontext()

    def agreed(self, *, wait: bool = False) -> bool:
        if not self._left:
            raise Enough
        self._left -= 1
        return False


def stretch(training: Any, steps: int) -> None:
    """So many steps of `train.fit`, from where the training is; nobody waits for the device, not even at their end."""
    steps_of_loop(training, _Limit(steps))


def steps_of_loop(training: Any, limit: Any) -> None:
    """Steps of `train.fit` until `limit.agreed`, which it asks before each, raises Enough."""
    from lockstep.training.calendar import Calendar, Due

    class Uneventful(Calendar):
        def after(self, step: int) -> Due:
            return Due(log=False, validate=False, save=False, histograms=False, epoch_ends=False)

    calendar = Uneventful(**{**asdict(training.calendar), "total_steps": sys.maxsize // 2**20})
    with suppress(Enough):
        program().fit(replace(training, preemption=limit, calendar=calendar))
