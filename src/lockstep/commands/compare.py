"""Compare two runs to the last bit, and their weights: `lockstep compare RUN_A RUN_B`.

Every training line of metrics.jsonl has the digest of all weights after its step, so two runs are equal through the
last line whose digest is the same. Where they part, the numerics of both tell why they may.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.errors import UserError
from lockstep.launch.numerics import describe_changes
from lockstep.models.weights import load_weights
from lockstep.run.history import read_history, read_starts
from lockstep.settings.config import changed_settings
from lockstep.settings.yaml import load_config

_SPEEDS = {"images_per_second", "data_share", "straggler", "straggler_rank"}
_WEIGHTS = ("checkpoints", "model.safetensors")


def relative_differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """For each tensor the largest |a - b|, as a share of the largest number in its layer of `a`.

    Not a number where either has one. Counts, which are whole numbers, are a layer each: they differ or they do not.
    Raises UserError if names or shapes differ.
    """
    if a.keys() != b.keys():
        only = sorted(a.keys() ^ b.keys())
        raise UserError(f"the runs hold different networks: {len(only)} weights are in one only, for example {only[0]}")
    scales: dict[str, float] = {}
    for name, tensor in a.items():
        if tensor.shape != b[name].shape:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)} in one run and {tuple(b[name].shape)} in the other"
            )
        layer = _layer_of(name, tensor)
        scales[layer] = max(scales.get(layer, 0.0), _largest(tensor.double()))
    differences = {}
    for name in a:
        difference = _largest(a[name].double() - b[name].double())
        scale = scales[_layer_of(name, a[name])]
        differences[name] = 0.0 if difference == 0 else difference / scale if scale else float("inf")
    return differences


def _layer_of(name: str, tensor: Tensor) -> str:
    return name.rpartition(".")[0] if tensor.is_floating_point() else name


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


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
        differing = [key for key in one.keys() & other.keys() if one[key] != other[key] and key not in _SPEEDS]
        if differing:
            key = min(differing, key=lambda key: (key != "digest", key))
            through = f"equal to the last bit through step {equal_through}" if equal_through else "not equal"
            return f"{through}; the {split} line of step {step} has {key} {one[key]} in one, {other[key]} in the other"
        if "digest" in one:
            equal_through = step
    return f"equal to the last bit through step {equal_through}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if the weights differ by more than the tolerance, else 0."""
    parser = argparse.ArgumentParser(prog="lockstep compare", description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--checkpoint", default="last", help="last, best or step_<8 digits>; default: last")
    parser.add_argument("--tolerance", type=float, default=1e-12, help="largest accepted difference; default: 1e-12")
    parser.add_argument("--per_tensor", action="store_true", help="one line per tensor")
    options = parser.parse_args(arguments)
    one, other = options.runs
    for run in options.runs:
        if not run.is_dir():
            raise UserError(f"there is no run in {run}")
    if (one / "config.yaml").is_file() and (other / "config.yaml").is_file():
        for change in changed_settings(load_config(one / "config.yaml"), load_config(other / "config.yaml")):
            print(f"note: other settings: {change}")
    histories = [read_history(run) for run in options.runs]
    equal = True
    if all(histories):
        verdict = compare_histories(*histories)
        equal = verdict.startswith("equal") and ";" not in verdict
        print(verdict if equal else f"{verdict}\n{_describe_numerics(one, other)}")
    bare = [run for run in options.runs if not any((run / name).exists() for name in _WEIGHTS)]
    if bare and all(histories):  # a digest chain, kept without its weights
        print(f"weights are not compared: {bare[0]} has no checkpoints")
        return 0 if equal else 1
    return _compare_weights(options)


def _describe_numerics(one: Path, other: Path) -> str:
    """In what the starts of two runs differ that the bits depend on."""
    both = [read_starts(run) or [{}] for run in (one, other)]
    changes = describe_changes(*(starts[0].get("numerics", {}) for starts in both))
    found = [f"numerics: {changes}"] if changes else []
    for run, starts in zip((one, other), both, strict=True):
        for before, now in pairwise(starts):
            if changes := describe_changes(before.get("numerics", {}), now.get("numerics", {})):
                found.append(f"changed after step {now.get('step', '?')} of {run}: {changes}")
    return "; ".join(found) or "numerics are the same"


def _compare_weights(options: argparse.Namespace) -> int:
    a, b = (_all_weights(run, options.checkpoint) for run in options.runs)
    folders = [(run / "checkpoints" / options.checkpoint).resolve().name for run in options.runs]
    if folders[0] != folders[1] and all(folder.startswith("step_") for folder in folders):
        print(f"note: these are the weights of {folders[0]} and of {folders[1]}")
    differences = relative_differences(a, b)
    if options.per_tensor:
        width = max(map(len, differences))
        for name, difference in differences.items():
            print(f"{name:<{width}}  {difference:.3g}")
    # A difference that is not a number must not pass for a small one.
    worst = max(
        differences, key=lambda name: float("inf") if differences[name] != differences[name] else differences[name]
    )
    equal = all(torch.equal(a[name], b[name]) for name in a)
    passes = differences[worst] <= options.tolerance
    verdict = "bit for bit equal" if equal else f"largest relative difference {differences[worst]:.3g} ({worst})"
    within = "within" if passes else "ABOVE"
    print(f"{len(a)} tensors of {options.checkpoint}: {verdict}; {within} the tolerance of {options.tolerance:g}")
    return 0 if passes else 1


def _all_weights(run: Path, name: str) -> dict[str, Tensor]:
    """Weights, running statistics and averages of a run folder's checkpoint, or of a checkpoint folder itself."""
    folder = run / "checkpoints" / name if (run / "checkpoints").is_dir() else run
    weights = load_weights(folder / "model.safetensors")
    average = folder / "ema.safetensors"
    if average.is_file():
        weights |= {f"average of {key}": value for key, value in load_weights(average).items()}
    return weights
