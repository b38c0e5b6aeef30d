"""Weights of a network: read from files, put into it."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lockstep.errors import UserError
from lockstep.files import MANIFEST, manifest_problem
from lockstep.launch.sharding import local, part_of

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def load_weights(place: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """Weights for evaluation from a .safetensors file, or the average, if there is one, of a checkpoint folder.

    A run folder stands for its best checkpoint.
    """
    if (place / "checkpoints" / "best").is_dir():
        place = place / "checkpoints" / "best"
    folder, name = (place, "model.safetensors") if place.is_dir() else (place.parent, place.name)
    if verify and (place.is_dir() or (place.is_file() and (folder / MANIFEST).is_file())):
        if problem := manifest_problem(folder, [name]):
            raise UserError(f"checkpoint {place} cannot be used: {problem}")
    if place.is_dir():
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


def put_weights(model: nn.Module, weights: dict[str, Tensor], source: str, *, new_head: bool = False) -> list[str]:
    """Load weights into a network; raises UserError naming what does not fit.

    With `new_head` the last layer may be for another number of classes, and then keeps its own weights, whose names
    are returned.
    """
    own = model.state_dict()
    head = _head_for_other_classes(own, weights) if new_head else []
    own = {name: value for name, value in own.items() if name not in head}
    weights = {name: value for name, value in weights.items() if name not in head}
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unknown or shapes:
        parts = {"missing": missing, "unknown": unknown, "of another shape": sorted(shapes)}
        details = "; ".join(f"{len(names)} {kind}, for example {names[0]}" for kind, names in parts.items() if names)
        raise UserError(f"{source} holds another network: weights {details}")
    with torch.no_grad():
        for name, value in own.items():
            local(value).copy_(local(part_of(weights[name], value)))
    return head


def fit_channels(model: nn.Module, weights: dict[str, Tensor]) -> str | None:
    """Fit a first convolution for colour, in place, to a network for another number of channels; its name, or None.

    For grey images its three parts are added up, as if each channel were the grey one: timm's rule.
    """
    own = model.state_dict()
    name = next((name for name, value in own.items() if value.ndim == 4), None)
    if name is None or name not in weights:
        return None
    (outputs, channels, *kernel), given = own[name].shape, weights[name]
    if channels == 3 or list(given.shape) != [outputs, 3, *kernel]:
        return None
    from timm.models import adapt_input_conv  # here, because timm takes seconds to import

    weights[name] = adapt_input_conv(channels, given)
    return name


def _head_for_other_classes(own: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """The names of the last layer's weights, if they differ from those given in their first size, and only there."""
    layer = [name for name, value in own.items() if value.ndim >= 2][-1].rpartition(".")[0]
    names = [name for name in own if name.rpartition(".")[0] == layer and name in weights]
    others = {name: (own[name].shape, weights[name].shape) for name in names if own[name].shape != weights[name].shape}
    return names if others and all(mine[1:] == given[1:] for mine, given in others.values()) else []
