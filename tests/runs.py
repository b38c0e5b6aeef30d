"""What runs have left, compared: everything but times must be the same."""

import json
from pathlib import Path
from typing import Any

import torch
from programs import read_lines

from lockstep.run.checkpoint import load_checkpoint
from lockstep.run.history import is_speed


def differences(run: Path, reference: Path) -> list[str]:
    """In what two finished runs differ, apart from times: no entries if nothing was lost, changed or left over."""
    found = []
    for link in ("best", "last"):
        a, b = (load_checkpoint(folder / "checkpoints" / link) for folder in (run, reference))
        for part in ("model", "ema", "optimizer"):
            if not _equal(getattr(a, part), getattr(b, part)):
                found.append(f"{part} of {link}")
        if timeless(a.progress) != timeless(b.progress):
            found.append(f"progress of {link}: {a.progress} instead of {b.progress}")
    lines = [[timeless(line) for line in read_lines(folder)] for folder in (run, reference)]
    if lines[0] != lines[1]:
        places = [[(line["split"], line["step"]) for line in part] for part in lines]
        found.append(f"metrics.jsonl: {places[0]} instead of {places[1]}" if places[0] != places[1] else "its values")
    # A process that is killed after its run has finished leaves its lease.
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"lease.json"} for folder in (run, reference)
    ]
    found += [f"stray {name}" for name in sorted(names[0] - names[1])]
    found += [f"missing {name}" for name in sorted(names[1] - names[0])]
    summaries = [timeless(json.loads((folder / "summary.json").read_text())) for folder in (run, reference)]
    return found if summaries[0] == summaries[1] else [*found, f"summary.json: {summaries[0]}"]


_TIMES = {"train_seconds", "wall_seconds", "restarts", "finished"}


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    """Without what tells of time and load."""
    return {key: value for key, value in values.items() if key not in _TIMES and not is_speed(key)}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
