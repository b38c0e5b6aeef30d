"""Residual networks short enough to read."""

from collections import OrderedDict

import torch.nn as nn
from torch import Tensor

from lockstep.settings.config import ModelConfig


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    Deep Residual Learning for Image Recognition, arXiv:1512.03385, figure 2 and option B.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = _conv_norm(inputs, outputs, 3, stride, batch_norm)
        self.conv2 = _conv_norm(outputs, outputs, 3, 1, batch_norm)
        changes = stride != 1 or inputs != outputs
        self.shortcut = _conv_norm(inputs, outputs, 1, stride, batch_norm) if changes else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        residual = self.conv2(self.relu(self.conv1(images)))
        return self.relu(residual + self.shortcut(images))


def resnet_basic(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A 7x7 stem and three stages of two residual blocks, 1, 2, 4 times `width` (64) channels; any image size."""
    width, norm = config.width or 64, config.batch_norm
    stages = OrderedDict(
        stage1=_stage(width, width, 1, norm),
        stage2=_stage(width, 2 * width, 2, norm),
        stage3=_stage(2 * width, 4 * width, 2, norm),
    )
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*_conv_norm(image_shape[0], width, 7, 2, norm), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            **stages,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(config.dropout or 0.0),
            head=nn.Linear(4 * width, num_classes),
        )
    )


def resnet9(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Eight convolutions and a linear layer, 1, 2, 4, 8 times `width` (64) channels: fast to train on 32x32 images.

    D. Page, How to Train Your ResNet (2018): 94 % on CIFAR-10 in 24 epochs. Images of 8 pixels at least.
    """
    width, norm = config.width or 64, config.batch_norm
    return nn.Sequential(
        OrderedDict(
            stem=_conv_relu(image_shape[0], width, norm),
            layer1=nn.Sequential(_conv_relu(width, 2 * width, norm), nn.MaxPool2d(2), _Pair(2 * width, norm)),
            layer2=nn.Sequential(_conv_relu(2 * width, 4 * width, norm), nn.MaxPool2d(2)),
            layer3=nn.Sequential(_conv_relu(4 * width, 8 * width, norm), nn.MaxPool2d(2), _Pair(8 * width, norm)),
            pool=nn.AdaptiveMaxPool2d(1),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(config.dropout or 0.0),
            head=_ScaledLinear(8 * width, num_classes),
        )
    )


class _Pair(nn.Module):
    """Two convolutions whose output, after the ReLU, is added to their input."""

    def __init__(self, channels: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = (_conv_relu(channels, channels, batch_norm) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.conv2(self.conv1(images))


class _ScaledLinear(nn.Linear):
    """Without bias, and times 1/8: what max-pooling lets through is large, and the softmax would begin too sure."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) / 8


def _conv_relu(inputs: int, outputs: int, batch_norm: bool) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(inputs, outputs, 3, 1, batch_norm), nn.ReLU())


def _stage(inputs: int, outputs: int, stride: int, batch_norm: bool) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(inputs, outputs, stride, batch_norm),
        ResidualBlock(outputs, outputs, 1, batch_norm),
    )


def _conv_norm(inputs: int, outputs: int, kernel_size: int, stride: int, batch_norm: bool) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=not batch_norm)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if batch_norm else nn.Sequential(conv)
