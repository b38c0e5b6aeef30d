"""Compare the final weights and running statistics of two runs: `lockstep compare --weights RUN_A RUN_B`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lockstep.errors import UserError
from lockstep.models.weights import load_weights
from lockstep.settings.config import changed_settings
from lockstep.settings.yaml import load_config


def relative_differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """For each tensor the largest |a - b|, as a share of the largest |a|; not a number where either has one.

    Raises UserError if names or shapes differ.
    """
    if a.keys() != b.keys():
        only = sorted(a.keys() ^ b.keys())
        raise UserError(f"the runs hold different networks: {len(only)} weights are in one only, for example {only[0]}")
    differences = {}
    for name in a:
        if a[name].shape != b[name].shape:
            raise UserError(
                f"{name} has shape {tuple(a[name].shape)} in one run and {tuple(b[name].shape)} in the other"
            )
        x, y = a[name].double(), b[name].double()
        scale = float(x.abs().max()) if x.numel() else 0.0
        difference = float((x - y).abs().max()) if x.numel() else 0.0
        differences[name] = 0.0 if difference == 0 else difference / scale if scale else float("inf")
    return differences


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if the largest difference exceeds the tolerance, else 0."""
    parser = argparse.ArgumentParser(prog="lockstep compare", description=__doc__)
    parser.add_argument("--weights", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"), required=True)
    parser.add_argument("--checkpoint", default="last", help="last, best or step_<8 digits>; default: last")
    parser.add_argument("--tolerance", type=float, default=1e-12, help="largest accepted difference; default: 1e-12")
    parser.add_argument("--per_tensor", action="store_true", help="one line per tensor")
    options = parser.parse_args(arguments)
    one, other = options.weights
    if (one / "config.yaml").is_file() and (other / "config.yaml").is_file():
        for change in changed_settings(load_config(one / "config.yaml"), load_config(other / "config.yaml")):
            print(f"note: other settings: {change}")
    a, b = (_all_weights(run, options.checkpoint) for run in options.weights)
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
    print(f"{len(a)} tensors: {verdict}; {'within' if passes else 'ABOVE'} the tolerance of {options.tolerance:g}")
    return 0 if passes else 1


def _all_weights(run: Path, name: str) -> dict[str, Tensor]:
    """Weights, running statistics and averages of a run folder's checkpoint, or of a checkpoint folder itself."""
    folder = run / "checkpoints" / name if (run / "checkpoints").is_dir() else run
    weights = load_weights(folder / "model.safetensors")
    average = folder / "ema.safetensors"
    if average.is_file():
        weights |= {f"average of {key}": value for key, value in load_weights(average).items()}
    return weights
