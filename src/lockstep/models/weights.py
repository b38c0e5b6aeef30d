"""Weights of a network: read from files, put into it."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lockstep.errors import UserError
from lockstep.files import manifest_problem
from lockstep.launch.sharding import local, part_of

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def load_weights(place: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """Weights for evaluation from a .safetensors file or a checkpoint folder (its average, if it has one)."""
    if place.is_dir():
        problem = manifest_problem(place, ["model.safetensors"]) if verify else None
        if problem:
            raise UserError(f"checkpoint {place} cannot be used: {problem}")
        ema = place / "ema.safetensors"
        place = ema if ema.is_file() else place / "model.safetensors"
    if not place.is_file():
        raise UserError(f"checkpoint {place} {'is not a file' if place.exists() else 'does not exist'}")
    if place.suffix in _PICKLED:
        raise UserError(f"checkpoint {place} is a pickle, which could run programs: save it as .safetensors")
    try:
        return load_file(place)
    except Exception as damage:  # safetensors has an exception type of its own, outside OSError and ValueError
        raise UserError(f"checkpoint {place} cannot be read: {damage}") from damage


def put_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights into a network; raises UserError naming what does not fit."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unknown or shapes:
        parts = {"missing": missing, "unknown": unknown, "of another shape": sorted(shapes)}
        details = "; ".join(f"{len(names)} {kind}, for example {names[0]}" for kind, names in parts.items() if names)
        raise UserError(f"{source} holds another network: weights {details}")
    with torch.no_grad():
        for name, value in own.items():
            local(value).copy_(local(part_of(weights[name], value)))
