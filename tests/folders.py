"""Run folders written by hand, for tests of what reads them."""

import json
from pathlib import Path
from typing import Any

from lockstep.settings.config import Config
from lockstep.settings.yaml import build_config, config_to_yaml

Lines = list[dict[str, Any]]


def settings(**flat: Any) -> Config:
    """The Config with `section__key=value`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    return build_config(sections)


def lines(accuracies: list[float], digests: str = "abcdefgh", lr: float = 0.1) -> Lines:
    """An epoch of 10 steps for each accuracy: a training line with a digest, and a validation of loss 1 - accuracy."""
    found: Lines = []
    for epoch, (accuracy, digest) in enumerate(zip(accuracies, digests, strict=False), 1):
        place = {"step": 10 * epoch, "epoch": epoch}
        speed = {"images_per_second": 100.0 + epoch}
        found.append({**place, "split": "train", "loss": 1.5 - accuracy, "lr": lr, "digest": digest, **speed})
        found.append({**place, "split": "val", "loss": 1 - accuracy, "accuracy": accuracy})
    return found


def finished(accuracy: float, **more: Any) -> dict[str, Any]:
    """The summary of a finished run; every other number is of two processes and half an hour."""
    results = {"state": "finished", "test_accuracy": accuracy, "test_loss": 1 - accuracy, "best_val_accuracy": accuracy}
    times = {"train_seconds": 1700.0, "wall_seconds": 1800.0, "images_per_second": 1000.0}
    return {**results, **times, "epochs": 2, "steps": 20, **more}


def write_run(folder: Path, summary: dict[str, Any] | None, history: Lines, **flat: Any) -> Path:
    """A run folder without weights; with no summary, as a run that was killed before it wrote one."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(settings(**flat)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    start = {"processes": 2, "device": "cpu", "numerics": {"threads": 1}}
    (folder / "environment.json").write_text(json.dumps([start]))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
