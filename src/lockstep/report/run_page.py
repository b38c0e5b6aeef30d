"""A run as one page for any browser, from what its folder holds: result, curves, mistakes, settings, starts.

The page asks no network for anything: pictures are in it, and its Content-Security-Policy forbids it to load more.
"""

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lockstep.errors import UserError
from lockstep.report.diagnosis import diagnose, read_evidence
from lockstep.report.page import write_page
from lockstep.run.folder import read_summary
from lockstep.run.history import read_history, read_starts
from lockstep.settings.cli import DEFAULT_RECIPE
from lockstep.settings.config import Config
from lockstep.settings.yaml import load_config

PAGE = "report.html"
_MOST_BYTES = 2_900_000  # of pictures, as base64: a page that mail and chat programs take
_HEADLINE = ("state", "test_accuracy", "best_val_accuracy", "test_loss", "epochs", "images_per_second", "wall_seconds")
_PICTURES = {
    "curves": "Curves",
    "confusion_matrix": "Confusion matrix of the test set",
    "pr_roc": "Precision, recall and ROC on the test set",
    "mistakes": "Worst mistakes on the test set",
    "suspicious_labels": "Labels of the test set that look wrong",
    "grad_cam": "Where the network looks",
    "embedding": "Images by their features",
    "feature_maps": "What its layers make of images",
    "filters": "Kernels of its first layer",
    "samples": "Samples of the training set",
    "augmentation": "What augmentation makes of them",
}


class _Picture(NamedTuple):
    title: str
    source: str
    """A data URL; empty for a picture that would make the page too large"""
    path: str


def write_run_page(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, under 3 MB; returns its path."""
    config, history, starts = load_config(run_dir / "config.yaml"), read_history(run_dir), read_starts(run_dir)
    evidence = read_evidence(run_dir, config)
    recipe = _recipe_of(starts)
    write_page(
        "run_page.html",
        run_dir / PAGE,
        name=run_dir.name,
        results=_results(read_summary(run_dir)),
        findings=diagnose(evidence) if evidence else None,
        pictures=list(_pictures(run_dir)),
        recipe=recipe.name if recipe else "the defaults",
        settings=_differences(config, recipe),
        epochs=_epochs(history),
        digests=_digests(history),
        starts=[_start(start) for start in starts],
    )
    return run_dir / PAGE


def _results(summary: dict[str, Any]) -> dict[str, str]:
    """What summary.json says, in words."""
    first = [key for key in _HEADLINE if key in summary]
    shown = {}
    for key in [*first, *(key for key in summary if key not in first)]:
        value = summary[key]
        if isinstance(value, float) and key.endswith("accuracy"):
            shown[key] = f"{value:.2%}"
        elif isinstance(value, float):
            shown[key] = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        elif key == "finished":
            shown[key] = str(value).replace("T", " ")[:16]
        elif isinstance(value, str | int):
            shown[key] = str(value)
    return {key.replace("_", " "): value for key, value in shown.items()}


def _pictures(run_dir: Path) -> Iterator[_Picture]:
    room = _MOST_BYTES
    for name, title in _PICTURES.items():
        path = run_dir / "figures" / f"{name}.png"
        if not path.is_file():
            continue
        encoded = base64.b64encode(path.read_bytes()).decode()
        fits = len(encoded) <= room
        room -= len(encoded) if fits else 0
        yield _Picture(title, f"data:image/png;base64,{encoded}" if fits else "", str(path.relative_to(run_dir)))


def _recipe_of(starts: Sequence[dict[str, Any]]) -> Path | None:
    """The file that the first start's command named, or the default one; None if it is not there."""
    command = starts[0].get("command") if starts else None
    words = [str(word) for word in command] if isinstance(command, list) else []
    named = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    named += [after for word, after in pairwise(words) if word == "--config"]
    recipe = Path(named[0]) if named else DEFAULT_RECIPE
    return recipe if recipe.is_file() else None


def _differences(config: Config, recipe: Path | None) -> list[tuple[str, str, str]]:
    """Setting, its value in the recipe (or by default), and in the run, where they differ."""
    try:
        before = load_config(recipe) if recipe else Config()
    except UserError:  # it is another file by now
        before = Config()
    old, new = asdict(before), asdict(config)
    return [
        (f"{section}.{key}", str(old[section][key]), str(value))
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value and (section, key) != ("run", "name")
    ]


def _epochs(history: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row per validation."""
    rows = []
    for line in history:
        if line.get("split") == "val" and "train_loss" in line:
            losses = [_number(line[key], ".4f") for key in ("train_loss", "loss")]
            shares = [_number(line[key], ".2%") for key in ("train_accuracy", "accuracy")]
            rows.append([str(line["epoch"]), str(line["step"]), losses[0], shares[0], losses[1], shares[1]])
    return rows


def _number(value: Any, shape: str) -> str:
    return format(value, shape) if isinstance(value, int | float) and math.isfinite(value) else "-"


def _digests(history: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Step and digest of the first and the last lines that have one."""
    known = [(str(line["step"]), str(line["digest"])) for line in history if "digest" in line]
    return known if len(known) <= 6 else [*known[:3], ("...", "..."), *known[-3:]]


def _start(start: dict[str, Any]) -> dict[str, str]:
    """One start, as names and texts."""
    numerics, versions = start.get("numerics", {}), start.get("versions", {})
    return {
        "started": str(start.get("started", "-")),
        "after step": str(start.get("step", "-")),
        "host": str(start.get("hostname", "-")),
        "device": f"{start.get('processes', '-')} x {numerics.get('device', start.get('device', '-'))}",
        "precision": str(numerics.get("precision", start.get("precision", "-"))),
        "threads": str(start.get("threads", "-")),
        "accumulation": str(start.get("accumulation", "-")),
        "commit": str(start.get("git_commit") or "-")[:12] + (" (changed)" if start.get("git_dirty") else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "numerics": ", ".join(f"{name} {value}" for name, value in numerics.items()),
        "command": " ".join(map(str, start["command"])) if isinstance(start.get("command"), list) else "-",
    }
