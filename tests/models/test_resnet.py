"""The basic ResNet: stages and shortcuts."""

import torch
from networks import COLOUR, build

from lockstep.models.resnet import ResidualBlock
from lockstep.models.summary import count_parameters


def test_resnet_basic_halves_the_image_in_every_later_stage() -> None:
    features = torch.zeros(2, *COLOUR)
    shapes = []
    for name, stage in list(build("resnet_basic", COLOUR).named_children())[:4]:
        features = stage(features)
        shapes.append((name, *features.shape[1:]))
    assert shapes == [("stem", 64, 8, 8), ("stage1", 64, 8, 8), ("stage2", 128, 4, 4), ("stage3", 256, 2, 2)]


def test_a_residual_block_has_a_shortcut_of_its_own_where_the_shape_changes() -> None:
    for inputs, outputs, stride, own in [(4, 4, 1, False), (4, 8, 1, True), (4, 4, 2, True)]:
        block = ResidualBlock(inputs, outputs, stride, batch_norm=True)
        assert block(torch.zeros(1, 4, 6, 6)).shape == (1, outputs, 6 // stride, 6 // stride)
        assert (count_parameters(block.shortcut) > 0) == own
