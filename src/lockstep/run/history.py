"""What a run folder says of its past: the records of metrics.jsonl, the source of truth, and every start.

Records are dictionaries like
`{"step": 150, "epoch": 4, "position": 9600, "split": "train", "loss": 0.12, "accuracy": 0.961, "lr": 0.001}`:
`epoch` counts from 1 (or is a fraction of epochs completed), `accuracy` is a share in [0, 1], and `split` is train,
val or test. Any other field is kept too.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lockstep.files import read_json, replace_file, require_plain_file

HISTORY = "metrics.jsonl"
ENVIRONMENT = "environment.json"
_SPEEDS = {"images_per_second", "straggler", "straggler_rank", "started_seconds"}
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """All records of `<run_dir>/metrics.jsonl` in order; empty if there is none, without a line cut off by a crash.

    Non-finite numbers come back as floats. Raises UserError for what is no file.
    """
    path = run_dir / HISTORY
    if not path.exists():
        return []
    require_plain_file(path)
    lines = path.read_bytes().splitlines()
    return [record for record in map(_parse, lines) if record is not None]


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """What environment.json says of every start so far; empty if there is none that can be read."""
    try:
        starts = read_json(run_dir / ENVIRONMENT)
    except (OSError, ValueError):
        return []
    known = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    return [start for start in known if isinstance(start.get("numerics", {}), dict)]


def truncate_history(run_dir: Path, step: int) -> None:
    """Cut metrics.jsonl back to `step`: drop later records and a half-written line, atomically; 0 drops everything."""
    path = run_dir / HISTORY
    if not path.exists():
        return
    old = path.read_bytes()
    kept = []
    for line in old.splitlines():
        record = _parse(line)
        # A test line at this step was written after its checkpoint, and will be written again.
        if record is not None and 0 < step and record.get("step", 0) <= step and record.get("split") != "test":
            kept.append(line + b"\n")
    if (new := b"".join(kept)) != old:
        replace_file(path, new)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step", 0), int | float):
        return None
    return {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def numbers_of(values: dict[str, Any]) -> dict[str, float]:
    """The fields that are single numbers; 0-d tensors and arrays count, flags and texts do not."""
    items = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}
    return {key: item for key, item in items.items() if isinstance(item, int | float) and not isinstance(item, bool)}


_AXES = ("step", "epoch", "position")


class Scalars(NamedTuple):
    """What the copies of a run get of a record."""

    axes: dict[str, float]
    """Those of step, epoch and position that it has"""
    values: dict[str, float]
    """Its other numbers, named `<split>/<field>`"""


def scalars_of(record: dict[str, Any]) -> Scalars:
    """A record's numbers as W&B and TensorBoard name them; `train_val_loss_ratio`, of two splits, keeps its name."""
    numbers = numbers_of(record)
    axes = {key: numbers.pop(key) for key in _AXES if key in numbers}
    split = record.get("split", "train")
    named = {key if key == "train_val_loss_ratio" else f"{split}/{key}": value for key, value in numbers.items()}
    return Scalars(axes, named)


class Point(NamedTuple):
    """A value of a record, and where it stands: epochs are fractions of those completed."""

    epoch: float
    value: float
    step: float


def curve(history: Sequence[dict[str, Any]], split: str, key: str) -> list[Point]:
    """The records of a split that have the value; NaN stays. A test stands at the step whose weights were tested."""
    scale = _epochs_per_step(history)
    records = [record for record in history if record.get("split") == split and _is_number(record.get(key))]
    steps = [record.get("best_step", record.get("step", 0)) for record in records]
    return [Point(step * scale, float(record[key]), step) for step, record in zip(steps, records, strict=True)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _epochs_per_step(history: Sequence[dict[str, Any]]) -> float:
    """Records count whole epochs, too coarse an axis; the first validation, at an epoch's end, gives the scale."""
    numbered = [record for record in history if _is_number(record.get("epoch")) and _is_number(record.get("step"))]
    records = [record for record in numbered if record["step"] and record["epoch"]]
    validated = [record for record in records if record.get("split") == "val"]
    chosen = (validated or records[-1:] or [{"epoch": 1, "step": 1}])[0]
    return float(chosen["epoch"]) / float(chosen["step"])


def is_speed(key: str) -> bool:
    """Whether a field tells of time and load, which no two runs have in common."""
    return key in _SPEEDS or key.endswith("_share") or key.startswith("node")


def compare_histories(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> str:
    """Up to which step two histories are equal in every figure but speeds, and the first line that is not."""
    ours, theirs = (
        {(line["split"], line["step"]): line for line in lines if {"split", "step"} <= line.keys()} for lines in (a, b)
    )
    shared = [place for place in ours if place in theirs]
    if not any("digest" in ours[place] and "digest" in theirs[place] for place in shared):
        return "no training line with a digest is in both: nothing can be said of their bits"
    equal_through = 0
    for split, step in shared:
        one, other = ours[split, step], theirs[split, step]
        differing = [key for key in one.keys() & other.keys() if one[key] != other[key] and not is_speed(key)]
        if differing:
            key = min(differing, key=lambda key: (key != "digest", key))
            through = f"equal to the last bit through step {equal_through}" if equal_through else "not equal"
            return f"{through}; the {split} line of step {step} has {key} {one[key]} in one, {other[key]} in the other"
        if "digest" in one:
            equal_through = step
    return f"equal to the last bit through step {equal_through}"
