"""Trackers and records for tests of what a run writes down."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.settings.config import Config, LogConfig, RunConfig

QUIET = LogConfig(wandb="disabled", tensorboard=False)


def configured(**log: Any) -> Config:
    return Config(log=replace(QUIET, **log), run=RunConfig(tags=("a", "b"), notes="a note"))


def train_record(step: int, **more: Any) -> dict[str, Any]:
    place = {"step": step, "epoch": 1, "position": step * 8, "split": "train"}
    return {**place, "loss": 1 / (step + 1), "lr": 0.01, **more}


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """All records of an offline W&B run, as W&B's own reader gives them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def wandb_points(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, in order, without W&B's own fields."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def wandb_summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary at the end, its nested keys joined with dots."""
    updates = [record["summary"].get("update", {}) for record in records if record["type"] == "summary"]
    return {key: value for update in updates for key, value in update.items()}
