"""Trackers and records for tests of what a run writes down."""

from dataclasses import replace
from typing import Any

from lockstep.settings.config import Config, LogConfig, RunConfig

QUIET = LogConfig(wandb="disabled", tensorboard=False)


def configured(**log: Any) -> Config:
    return Config(log=replace(QUIET, **log), run=RunConfig(tags=("a", "b"), notes="a note"))


def train_record(step: int, **more: Any) -> dict[str, Any]:
    place = {"step": step, "epoch": 1, "position": step * 8, "split": "train"}
    return {**place, "loss": 1 / (step + 1), "lr": 0.01, **more}
