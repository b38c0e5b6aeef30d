"""The small networks: their layers, sizes, noise and initial weights."""

import math

import pytest
import torch
import torch.nn as nn
from networks import COLOUR, DIGITS, GREY, build, of_type, refusal

from lockstep.models.summary import count_parameters

LEAST_SIZE = {"tiny_cnn": 4, "simple_cnn": 8, "fashion_cnn": 4, "cifar10_cnn": 22, "vgg_small": 4}


@pytest.mark.parametrize(("name", "least"), LEAST_SIZE.items())
def test_the_least_image_size_is_exact(name: str, least: int) -> None:
    assert build(name, (1, least, least + 3)).eval()(torch.zeros(1, 1, least, least + 3)).shape == (1, 10)
    message = refusal(name, (1, least + 3, least - 1))
    assert f"{name} cannot take {least + 3}x{least - 1} images" in message
    assert f"at least {least}x{least}" in message


def test_a_size_refusal_shows_where_the_pixels_end() -> None:
    expected = "cifar10_cnn cannot take 8x8 images: 3x3 convolutions and pooling leave 0 pixels after block 2"
    assert expected in refusal("cifar10_cnn", (3, 8, 8))


@pytest.mark.parametrize("name", ["mlp", "mlp_dropout", "tiny_cnn", "simple_cnn", "fashion_cnn", "resnet_basic"])
def test_digits_fit(name: str) -> None:
    assert build(name, DIGITS)(torch.randn(4, *DIGITS)).shape == (4, 10)


def test_cifar10_cnn_leaves_two_by_two_pixels() -> None:
    features = build("cifar10_cnn", COLOUR).get_submodule("features")
    assert features(torch.zeros(1, *COLOUR)).shape == (1, 128, 2, 2)


def test_fashion_cnn_starts_from_its_own_weights() -> None:
    model = build("fashion_cnn")
    for conv in of_type(model, nn.Conv2d):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * conv.out_channels)), rel=0.15)
    for linear in of_type(model, nn.Linear):
        expected = math.sqrt(2 / (linear.in_features + linear.out_features))
        assert linear.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert not linear.bias.any()
    # Normal, not uniform: a uniform variable never exceeds sqrt(3) standard deviations.
    wide = of_type(model, nn.Linear)[0].weight
    assert wide.abs().max() > 2.5 * wide.std()


@pytest.mark.parametrize("choice", ["kaiming_normal", "xavier_uniform", "xavier_normal", "constant"])
def test_init_reaches_convolutions_and_linear_layers(choice: str) -> None:
    for layer in of_type(build("vgg_small", init=choice), nn.Conv2d, nn.Linear):
        weight = layer.weight
        area = weight[0, 0].numel()
        fan_in, fan_out = weight.shape[1] * area, weight.shape[0] * area
        variance = {"kaiming_normal": 2 / fan_out, "constant": 0.0}.get(choice, 2 / (fan_in + fan_out))
        assert weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.15, abs=1e-6)
        assert not layer.bias.any()
        if choice == "constant":
            assert weight.flatten()[0].item() == pytest.approx(1 / fan_in)
        if choice == "xavier_uniform":
            assert weight.abs().max() <= math.sqrt(3 * variance)


def test_noise_is_added_while_training_only() -> None:
    model, images = build("mlp", noise=0.5), torch.randn(64, *GREY)
    assert torch.equal(model.eval()(images), build("mlp").eval()(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    layer = model[1]
    with torch.no_grad():
        layer.weight.copy_(torch.eye(128, 784))
    added = layer(torch.zeros(512, 784))
    assert added.std().item() == pytest.approx(0.5, rel=0.05)
    assert added.mean().item() == pytest.approx(0.0, abs=0.02)


def test_the_variants_of_the_recipes_are_reachable() -> None:
    tiny = build("tiny_cnn", width=8, dropout=0.5)
    assert [conv.out_channels for conv in of_type(tiny, nn.Conv2d)] == [8, 16]
    assert [dropout.p for dropout in of_type(tiny, nn.Dropout)] == [0.5]
    plain = build("mlp_dropout", batch_norm=False, hidden=(256,), dropout=0.5)
    assert [type(layer).__name__ for layer in plain.children()] == ["Flatten", "Linear", "ReLU", "Dropout", "Linear"]
    assert count_parameters(plain) == 785 * 256 + 257 * 10
    assert [dropout.p for dropout in of_type(build("mlp_dropout", batch_norm=False), nn.Dropout)] == [0.3, 0.2]
    assert [dropout.p for dropout in of_type(build("fashion_cnn", dropout=0.4), nn.Dropout)] == [0.4, 0.4, 0.2]
    for name in ("fashion_cnn", "cifar10_cnn", "resnet_basic"):
        assert of_type(build(name, COLOUR), nn.BatchNorm1d, nn.BatchNorm2d)
        bare = build(name, COLOUR, batch_norm=False)
        assert not of_type(bare, nn.BatchNorm1d, nn.BatchNorm2d)
        assert all(conv.bias is not None for conv in of_type(bare, nn.Conv2d))
