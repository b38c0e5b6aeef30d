"""The multilayer perceptrons and small convolutional networks of the recipes."""

from collections import OrderedDict
from math import prod
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lockstep.errors import UserError
from lockstep.settings.config import ModelConfig

ImageShape = tuple[int, int, int]


class NoisyLinear(nn.Linear):
    """A linear layer that adds Gaussian noise of a fixed standard deviation to its input, while training only."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, noise: float) -> None:
        super().__init__(in_features, out_features, bias)
        self.noise = noise

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            input = input + self.noise * torch.randn_like(input)
        return super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, noise={self.noise}"


def mlp(config: ModelConfig, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """One hidden layer of `width` (128) ReLUs, no biases."""
    width = config.width or 128
    return nn.Sequential(
        nn.Flatten(),
        _hidden_linear(prod(image_shape), width, config.noise, bias=False),
        nn.ReLU(),
        nn.Linear(width, num_classes, bias=False),
    )


def mlp_dropout(config: ModelConfig, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Hidden layers (256, 128), each with batch norm, ReLU and dropout 0.2 (without batch norm: 0.3, then 0.2)."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = prod(image_shape)
    for index, outputs in enumerate(config.hidden or (256, 128)):
        own_dropout = 0.3 if index == 0 and not config.batch_norm else 0.2
        layers.append(_hidden_linear(inputs, outputs, config.noise, bias=not config.batch_norm))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers += [nn.ReLU(), nn.Dropout(_dropout(config, own_dropout))]
        inputs = outputs
    return nn.Sequential(*layers, nn.Linear(inputs, num_classes))


def tiny_cnn(config: ModelConfig, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Two convolutions of `width` (16) and twice as many channels, each with ReLU and pooling; one linear layer."""
    width = config.width or 16
    features, size = _features(config, image_shape, [Block((width,)), Block((2 * width,))])
    head = [nn.Flatten(), nn.Dropout(_dropout(config, 0.0)), nn.Linear(size, num_classes)]
    return _join(features, head)


def simple_cnn(config: ModelConfig, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Three convolutions of 1, 2, 4 times `width` (32) channels with ReLU and pooling; dropout 0.25 twice."""
    width, dropout = config.width or 32, _dropout(config, 0.25)
    features, size = _features(config, image_shape, [Block((width,)), Block((2 * width,)), Block((4 * width,))])
    hidden = [nn.Dropout(dropout), _hidden_linear(size, 256, config.noise), nn.ReLU()]
    return _join(features, [nn.Flatten(), *hidden, nn.Dropout(dropout), nn.Linear(256, num_classes)])


def fashion_cnn(config: ModelConfig, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Three blocks of two convolutions with batch norm, `width` (32) channels at first; a head of three layers.

    Dropout is p (0.3) before and after the head's first layer and p / 2 after its second. Convolutions start from
    kaiming_normal (fan_out), linear layers from xavier_normal, biases from zero.
    """
    width, norm, dropout = config.width or 32, config.batch_norm, _dropout(config, 0.3)
    blocks = [Block((width,) * 2), Block((2 * width,) * 2), Block((4 * width,) * 2, pool=False)]
    features, _ = _features(config, image_shape, blocks, norm)
    hidden1 = [_hidden_linear(4 * width, 256, config.noise), nn.ReLU(), *_norm1d(256, norm), nn.Dropout(dropout)]
    hidden2 = [_hidden_linear(256, 128, config.noise), nn.ReLU(), *_norm1d(128, norm), nn.Dropout(dropout / 2)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]
    model = _join(features, [*pool, *hidden1, *hidden2, nn.Linear(128, num_classes)])
    set_initial_weights(model, "kaiming_normal", linear="xavier_normal")
    return model


def cifar10_cnn(config: ModelConfig, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Three convolutions without padding, 1, 2, 4 times `width` (32) channels, each with batch norm, ReLU, pooling."""
    width = config.width or 32
    blocks = [Block((channels,), padding=0) for channels in (width, 2 * width, 4 * width)]
    features, size = _features(config, image_shape, blocks, config.batch_norm)
    hidden = [_hidden_linear(size, 256, config.noise), nn.ReLU(), nn.Dropout(_dropout(config, 0.5))]
    return _join(features, [nn.Flatten(), *hidden, nn.Linear(256, num_classes)])


def vgg_small(config: ModelConfig, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Two convolutions of `width` (64) and twice as many channels with ReLU and pooling; 512 hidden neurons."""
    width = config.width or 64
    features, size = _features(config, image_shape, [Block((width,)), Block((2 * width,))])
    hidden = [_hidden_linear(size, 512, config.noise), nn.ReLU(), nn.Dropout(_dropout(config, 0.5))]
    return _join(features, [nn.Flatten(), *hidden, nn.Linear(512, num_classes)])


def set_initial_weights(model: nn.Module, choice: str, *, linear: str | None = None) -> None:
    """Set the weights of convolutions to `choice` and of linear layers to `linear` (default: the same), biases to 0.

    Choices are those of `--model.init`; `default` leaves the model alone. kaiming_normal is He's initialisation
    (arXiv:1502.01852) with fan_out and the gain of ReLU, xavier_* Glorot's (AISTATS 2010) with gain 1, constant
    gives all weights 1 / fan_in: it keeps the scale of the input, and shows why symmetry has to be broken.
    """
    if choice == "default":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            _fill(module.weight, linear if linear and isinstance(module, nn.Linear) else choice)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _fill(weight: Tensor, choice: str) -> None:
    if choice == "kaiming_normal":
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    elif choice == "xavier_uniform":
        nn.init.xavier_uniform_(weight)
    elif choice == "xavier_normal":
        nn.init.xavier_normal_(weight)
    else:
        assert choice == "constant", choice
        nn.init.constant_(weight, 1 / weight[0].numel())


class Block(NamedTuple):
    """3x3 convolutions of these channels, each with ReLU; then perhaps 2x2 pooling."""

    channels: tuple[int, ...]
    padding: int = 1
    pool: bool = True

    @property
    def lost(self) -> int:
        """Pixels of height and width that the convolutions take away."""
        return len(self.channels) * (2 - 2 * self.padding)

    def output_size(self, size: int) -> int:
        left = max(0, size - self.lost)
        return left // 2 if self.pool else left

    def least_input_size(self, output_size: int) -> int:
        return (2 * output_size if self.pool else output_size) + self.lost

    def layers(self, inputs: int, batch_norm: bool) -> nn.Sequential:
        layers: list[nn.Module] = []
        for outputs in self.channels:
            # Before batch norm a bias has no effect, but its gradient, mere rounding noise, would move it under Adam.
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=self.padding, bias=not batch_norm))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if batch_norm else [nn.ReLU()]
            inputs = outputs
        return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if self.pool else []))


def _features(
    config: ModelConfig, image_shape: ImageShape, blocks: list[Block], batch_norm: bool = False
) -> tuple[nn.Sequential, int]:
    """The blocks one after the other, and how many numbers they make of an image; UserError if none."""
    channels, height, width = image_shape
    sizes = [height, width]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, block in enumerate(blocks, start=1):
        sizes = [block.output_size(size) for size in sizes]
        if min(sizes) == 0:
            least = 1
            for earlier in reversed(blocks):
                least = earlier.least_input_size(least)
            raise UserError(
                f"{config.name} cannot take {height}x{width} images: 3x3 convolutions and pooling leave 0 pixels "
                f"after block {number}; it needs at least {least}x{least} (see --augment.image_size)"
            )
        layers[f"block{number}"] = block.layers(channels, batch_norm)
        channels = block.channels[-1]
    return nn.Sequential(layers), channels * sizes[0] * sizes[1]


def _norm1d(features: int, batch_norm: bool) -> list[nn.Module]:
    return [nn.BatchNorm1d(features)] if batch_norm else []


def _hidden_linear(inputs: int, outputs: int, noise: float, *, bias: bool = True) -> nn.Linear:
    return NoisyLinear(inputs, outputs, bias, noise=noise) if noise else nn.Linear(inputs, outputs, bias)


def _dropout(config: ModelConfig, own: float) -> float:
    return own if config.dropout is None else config.dropout


def _join(features: nn.Sequential, head: list[nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(features=features, head=nn.Sequential(*head)))
