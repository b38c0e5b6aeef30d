"""A look into a trained network: which units are silent, how gradients reach its layers, how far its weights moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lockstep.augment.transform import build_transform
from lockstep.data.images import Data
from lockstep.launch.sharding import is_sharded
from lockstep.models.network import build_network
from lockstep.randomness import seed_run
from lockstep.settings.config import Config

_MOST_IMAGES = 64
_WITH_ZEROS = (nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class Probe:
    """What was seen on one batch."""

    images: int
    accuracy: float
    """On these images of the training set, as evaluation sees them"""
    silent: dict[str, float]
    """For each ReLU, by name, the share of its channels that put out zero everywhere, for every image"""
    gradients: dict[str, float]
    """For each weight of two dimensions or more, in the network's order, the root mean square of its gradient"""
    moved: float | None
    """Distance of those weights from the first ones, as a share of the size of these; None: not known"""


def probe(config: Config, data: Data, model: nn.Module, micro_batch_size: int) -> Probe | None:
    """Look into the bare network with a few training images, evenly spread; None for a sharded one, or no image.

    Draws from torch's generators, so not while training goes on. This process alone is enough.
    """
    if is_sharded(model):
        return None
    count = min(len(data.train), micro_batch_size, _MOST_IMAGES)
    chosen = torch.linspace(0, len(data.train) - 1, count).long().tolist()
    loaded = [
        (image, int(data.train.labels[index])) for index in chosen if (image := data.train.load(index)) is not None
    ]
    if not loaded:
        return None
    device = next(model.parameters()).device
    transform = build_transform(config, data.mean, data.std, data.num_classes, precropped=False)
    images = transform.evaluate(torch.stack([image for image, _ in loaded]).to(device))
    return look_into(model, images, torch.tensor([label for _, label in loaded], device=device), _first(config, data))


def _first(config: Config, data: Data) -> dict[str, Tensor] | None:
    """The weights that training began with, if they were drawn: those that were loaded move little in good training."""
    if config.model.pretrained or config.model.checkpoint or config.run.from_run:
        return None
    seed_run(config.run.seed)
    return dict(build_network(config, data, torch.device("cpu"), resumes=False).named_parameters())


def look_into(model: nn.Module, images: Tensor, labels: Tensor, first: dict[str, Tensor] | None) -> Probe:
    """Pass a normalised batch (B, C, H, W), labels (B,), through the bare network in evaluation mode, and back.

    `first`: the weights that training began with, by name. Modes, gradients and running statistics are left as they
    were. A microbatch of training fits into memory here, too.
    """
    was_training = model.training
    model.eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and weight.ndim >= 2}
    try:
        with _silence_noted(model) as silent:
            logits = model.forward(images).float()  # not by a call, which would compile it, hooks and all
        loss = functional.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True) if weights else ()
    finally:
        model.train(was_training)
    sizes = {name: _rms(gradient) for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return Probe(len(images), accuracy, silent, sizes, None if first is None else _distance(weights, first))


@contextmanager
def _silence_noted(model: nn.Module) -> Iterator[dict[str, float]]:
    """Within it every forward notes, for each ReLU, the share of silent channels; of several calls the highest."""
    silent: dict[str, float] = {}

    def note(name: str, output: Tensor) -> None:
        maps = output.detach()
        channels = (
            maps.movedim(1, -1) if maps.ndim == 4 else maps
        )  # tokens (B, N, C) and features (B, C) have them last
        share = (channels.flatten(0, -2) <= 0).all(0).float().mean().item()
        silent[name] = max(silent.get(name, 0.0), share)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if isinstance(module, _WITH_ZEROS)
    ]
    try:
        yield silent
    finally:
        for hook in hooks:
            hook.remove()


def _rms(values: Tensor) -> float:
    return values.detach().double().square().mean().sqrt().item()


def _distance(weights: dict[str, nn.Parameter], first: dict[str, Tensor]) -> float:
    pairs = [(weight.detach().double().cpu(), first[name].detach().double().cpu()) for name, weight in weights.items()]
    moved = sum(float((now - before).square().sum()) for now, before in pairs)
    size = sum(float(before.square().sum()) for _, before in pairs)
    return (moved / max(size, 1e-30)) ** 0.5
