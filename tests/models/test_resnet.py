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


def test_resnet9_halves_the_image_in_every_layer_and_adds_where_it_says() -> None:
    network = build("resnet9", COLOUR).eval()
    features, shapes = torch.rand(2, *COLOUR), []
    for name, part in list(network.named_children())[:4]:
        features = part(features)
        shapes.append((name, *features.shape[1:]))
    assert shapes == [("stem", 64, 32, 32), ("layer1", 128, 16, 16), ("layer2", 256, 8, 8), ("layer3", 512, 4, 4)]
    pair = network.layer1[2]
    inputs = torch.rand(1, 128, 4, 4)
    torch.testing.assert_close(pair(inputs), inputs + pair.conv2(pair.conv1(inputs)))
    pooled = torch.rand(1, 512)
    torch.testing.assert_close(network.head(pooled), pooled @ network.head.weight.T / 8)


def test_a_residual_block_has_a_shortcut_of_its_own_where_the_shape_changes() -> None:
    for inputs, outputs, stride, own in [(4, 4, 1, False), (4, 8, 1, True), (4, 4, 2, True)]:
        block = ResidualBlock(inputs, outputs, stride, batch_norm=True)
        assert block(torch.zeros(1, 4, 6, 6)).shape == (1, outputs, 6 // stride, 6 // stride)
        assert (count_parameters(block.shortcut) > 0) == own
