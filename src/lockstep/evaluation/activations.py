"""What the layers of a network put out for some images, by the names of `named_modules()`."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def as_maps(model: nn.Module, layer: nn.Module, output: Any) -> Tensor | None:
    """A layer's output as maps (N, channels, height, width) of more than one pixel; None if it is nothing of the kind.

    timm's networks may have channels last, and tokens (N, tokens, channels), of which those of patches form a map.
    """
    if not isinstance(output, Tensor):
        return None
    grid, maps = getattr(getattr(model, "patch_embed", None), "grid_size", None), None
    has_tokens = grid is not None and hasattr(model, "num_prefix_tokens")
    if output.ndim == 4 and (isinstance(layer, nn.Conv2d) or not has_tokens):
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC" and not isinstance(layer, nn.Conv2d)
        maps = output.movedim(3, 1) if channels_last else output
    elif output.ndim == 3 and has_tokens:
        assert grid is not None
        patches = output[:, -grid[0] * grid[1] :]  # other tokens come first
        maps = patches.movedim(2, 1).unflatten(2, grid) if patches.shape[1] == grid[0] * grid[1] else None
    return maps if maps is not None and maps.shape[2] * maps.shape[3] > 1 else None


@torch.no_grad()
def map_sizes(model: nn.Module, images: Tensor) -> dict[str, tuple[int, int]]:
    """Height and width of each layer's maps, by name, in the order in which the layers are done.

    They have the shape of the images (N, C, H, W) up to a pixel: what is held with channels last for a while has not.
    And there is one of each image: not of windows that it was cut into.
    """
    sizes: dict[str, tuple[int, int]] = {}
    tall, wide = images.shape[2:]
    with recorded(model, [name for name, _ in model.named_modules() if name]) as outputs:
        model(images)
    for name, output in outputs.items():
        maps = as_maps(model, model.get_submodule(name), output)
        if maps is None or len(maps) != len(images):
            continue
        if abs(maps.shape[2] * wide - maps.shape[3] * tall) <= max(tall, wide):
            sizes[name] = (maps.shape[2], maps.shape[3])
    return sizes


def unpooled(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The layers that neither pool nor end in one that does: what they put out is finer."""
    return [name for name in names if not _ends_in_pooling(model.get_submodule(name))]


def _ends_in_pooling(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Sequential) and len(layer):
        return _ends_in_pooling(layer[-1])
    return isinstance(layer, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d)


@contextmanager
def recorded(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Any]]:
    """Within it a forward leaves the outputs of these layers in the dictionary; of several calls, the last one's.

    The network goes on with a copy of each, so that no activation that works in place changes what is kept.
    """
    outputs: dict[str, Any] = {}

    def keep(name: str, output: Any) -> Any:
        outputs.pop(name, None)  # so that the order is that of the last calls
        outputs[name] = output
        return output.clone() if isinstance(output, Tensor) else None

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, classes), and what the last linear layer makes them of, (N, features): without one, the logits."""
    last: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 2:
            last[:] = [(inputs[0], output)]

    hooks = [layer.register_forward_hook(keep) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, last[0][0] if last and last[0][1].shape == logits.shape else logits


def first_kernels(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, Tensor] | None:
    """Name and kernels (outputs, C, h, w) of the first layer with weights; None if it takes no images (C, H, W).

    Those of a linear layer are as large as the image.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            return (name, layer.weight) if layer.weight.shape[1] == image_shape[0] else None
        if isinstance(layer, nn.Linear):
            pixels = image_shape[0] * image_shape[1] * image_shape[2]
            return (name, layer.weight.unflatten(1, image_shape)) if layer.in_features == pixels else None
    return None
