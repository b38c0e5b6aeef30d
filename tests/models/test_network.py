"""Networks by name: parameters, gradients, settings that mean something to them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from networks import COLOUR, GREY, build, of_type, refusal

from lockstep.errors import UserError
from lockstep.models.network import NETWORKS, build_model, require_smaller_images
from lockstep.models.summary import count_parameters
from lockstep.settings.cli import parse_config
from lockstep.settings.config import ModelConfig


# Counted by hand from the layer lists; no bias where batch norm follows.
@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp", GREY, 784 * 128 + 128 * 10),
        ("mlp_dropout", GREY, 784 * 256 + 2 * 256 + 256 * 128 + 2 * 128 + 129 * 10),
        ("tiny_cnn", GREY, 10 * 16 + 145 * 32 + (32 * 7 * 7 + 1) * 10),
        ("simple_cnn", GREY, 390_410),
        ("fashion_cnn", GREY, 354_858),
        ("cifar10_cnn", COLOUR, 27 * 32 + 64 + 288 * 64 + 128 + 576 * 128 + 256 + 513 * 256 + 257 * 10),
        ("vgg_small", COLOUR, 28 * 64 + 577 * 128 + (128 * 8 * 8 + 1) * 512 + 513 * 10),
        ("resnet9", COLOUR, 6_573_120),
        ("resnet_basic", COLOUR, 2_785_354),
        ("timm/resnet18", COLOUR, 11_173_962),
    ],
)
def test_every_network_has_its_parameters(name: str, shape: tuple[int, int, int], parameters: int) -> None:
    assert count_parameters(build(name, shape)) == parameters


@pytest.mark.parametrize("name", [*NETWORKS, "timm/test_resnet", "timm/test_convnext"])
@pytest.mark.parametrize("shape", [(1, 32, 32), COLOUR])
def test_forward_and_backward_reach_every_parameter(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape, classes=7)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    assert (logits.exp().sum(dim=1) - 1).abs().min() > 1e-3  # logits, not log-probabilities
    F.cross_entropy(logits, torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", [*NETWORKS, "timm/test_resnet"])
def test_float64_works(name: str) -> None:
    settings: dict[str, Any] = {"noise": 0.1} if name in NETWORKS and "noise" in NETWORKS[name].settings else {}
    logits = build(name, COLOUR, **settings).double()(torch.randn(4, *COLOUR, dtype=torch.float64))
    assert logits.dtype == torch.float64


@pytest.mark.parametrize("name", [*NETWORKS, "timm/test_resnet"])
def test_the_seed_decides_the_weights(name: str) -> None:
    model, twin = build(name, COLOUR), build(name, COLOUR)
    torch.manual_seed(1)
    other = build_model(ModelConfig(name=name), COLOUR, 10)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())
    assert any(not torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if "width" in network.settings])
def test_width_sets_the_first_layer(name: str) -> None:
    first = of_type(build(name, COLOUR, width=12), nn.Conv2d, nn.Linear)[0]
    assert first.weight.shape[0] == 12


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if "dropout" in network.settings])
def test_dropout_zero_means_none(name: str) -> None:
    model, images = build(name, COLOUR, dropout=0.0), torch.randn(4, *COLOUR)
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {"dropout": 0.1}),
        ("mlp_dropout", {"width": 3}),
        ("cifar10_cnn", {"hidden": (3,)}),
        ("vgg_small", {"batch_norm": False}),
        ("tiny_cnn", {"noise": 0.1}),
        ("fashion_cnn", {"drop_path": 0.1}),
        ("fashion_cnn", {"stem": "cifar"}),
        ("fashion_cnn", {"pretrained": True}),
        ("timm/resnet18", {"width": 3}),
        ("timm/resnet18", {"init": "constant"}),
        ("timm/densenet121", {"drop_path": 0.1}),
        ("timm/test_mambaout", {"stem": "cifar"}),
    ],
)
def test_a_setting_without_use_is_refused(name: str, settings: dict[str, Any]) -> None:
    message = refusal(name, COLOUR, **settings)
    assert f"--model.{next(iter(settings))}" in message and name in message


def test_unknown_names_list_the_nearest() -> None:
    assert "did you mean fashion_cnn" in refusal("fashion_cn")
    assert "did you mean timm/resnet18" in refusal("resnet18")
    assert "timm/resnet50" in refusal("timm/resent50")
    assert "resnet18.a1_in1k" in refusal("timm/resnet18.b1_in1k")
    for foreign in ("timm/hf-hub:timm/resnet18.a1_in1k", "timm/local-dir:/tmp"):
        assert "is unknown" in refusal(foreign)
        assert all(name in refusal(foreign) for name in NETWORKS)


def test_networks_that_cannot_take_smaller_images_are_told() -> None:
    config = parse_config(["--augment.progressive_size=16", "--augment.progressive_epochs=3"])
    for name in ("timm/test_resnet", "resnet_basic"):
        sized = replace(config, model=ModelConfig(name=name))
        model = build(name, COLOUR).train()
        require_smaller_images(model, sized, COLOUR)
        assert model.training
    for name in ("mlp", "vgg_small", "cifar10_cnn"):
        sized = replace(config, model=ModelConfig(name=name))
        with pytest.raises(UserError, match=f"--augment.progressive_size=16: {name} cannot take images of 16x16"):
            require_smaller_images(build(name, COLOUR), sized, COLOUR)
    large = replace(config, augment=replace(config.augment, progressive_size=64))
    with pytest.raises(UserError, match="--augment.progressive_size=64 is above the full size, 32"):
        require_smaller_images(build("resnet_basic", COLOUR), large, COLOUR)
