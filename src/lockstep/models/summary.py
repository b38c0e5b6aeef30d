"""What a network consists of: layers, parameters and work."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def summarize_model(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Layer table (name, type, output shape for one image, parameters), totals, and FLOPs of one forward.

    `image_shape` is (channels, height, width). One image of zeros passes through in evaluation mode; the model is
    left as it was: modes, hooks, gradients and running statistics.
    """
    layers = {name: module for name, module in model.named_modules() if _has_a_row(module)}
    shapes, flops = _trace(model, layers, image_shape)
    rows = [("layer", "type", "output", "parameters")]
    for name, layer in layers.items():
        own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        rows.append((name or "(top)", type(layer).__name__, shapes.get(name, "-"), f"{own:,}"))
    shape = "x".join(map(str, image_shape))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return "\n".join(
        [
            *_aligned(rows),
            f"parameters: {count_parameters(model):,} ({size / 2**20:.1f} MiB)",
            f"forward of one {shape} image: {flops / 1e6:,.1f} MFLOPs (a multiply-add is two)",
        ]
    )


def forward_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward, a multiply-add counted as two; the model is left as it was."""
    return _trace(model, {}, image_shape)[1]


def layer_rows(model: nn.Module) -> list[tuple[str, str, str, int]]:
    """Name, type, shape of the weight and number of parameters of each layer, without a pass through the network."""
    rows = []
    for name, layer in model.named_modules():
        if _has_a_row(layer):
            own = list(layer.parameters(recurse=False))
            shape = "x".join(map(str, own[0].shape)) if own else ""
            rows.append((name or "(top)", type(layer).__name__, shape, sum(parameter.numel() for parameter in own)))
    return rows


def _has_a_row(module: nn.Module) -> bool:
    leaf = next(module.children(), None) is None
    return leaf or next(module.parameters(recurse=False), None) is not None


def _trace(
    model: nn.Module, layers: dict[str, nn.Module], image_shape: tuple[int, int, int]
) -> tuple[dict[str, str], int]:
    """Output shape of every layer that ran, and the FLOPs of one forward."""
    shapes: dict[str, str] = {}

    def shape_hook(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = "x".join(map(str, output.shape[1:]))

        return hook

    like = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_hook(shape_hook(name)) for name, layer in layers.items()]
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        with torch.no_grad(), counter:
            model.forward(torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype))
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return shapes, counter.get_total_flops()


def _aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    name, kind, shape, count = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"{row[0]:<{name}}  {row[1]:<{kind}}  {row[2]:>{shape}}  {row[3]:>{count}}" for row in rows]
