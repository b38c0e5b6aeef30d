"""Grad-CAM against what it is by its definition.

It was also compared with the package grad-cam 1.5.7, each map brought to [0, 1] as there: tiny_cnn, fashion_cnn,
resnet9, resnet_basic and timm's resnet18, mobilenetv3_small_100, convnext_atto, efficientnet_b0, vit_tiny_patch16_224
and swin_tiny_patch4_window7_224, untrained, differ by at most 1.3e-6.
"""

import pytest
import torch
from torch import nn

from lockstep.evaluation.activations import map_sizes, unpooled
from lockstep.evaluation.grad_cam import grad_cam, usual_layer
from lockstep.models.network import build_model
from lockstep.settings.config import ModelConfig


def test_before_global_pooling_it_is_the_class_activation_map() -> None:
    """Zhou et al., Learning deep features for discriminative localization, CVPR 2016."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
    head = nn.Linear(8, 5)
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).requires_grad_(False)
    images, classes = torch.randn(6, 3, 9, 7), torch.tensor([0, 1, 2, 3, 4, 0])
    maps = (head.weight[classes][:, :, None, None] * features(images)).sum(1).relu()
    expected = maps / maps.amax((1, 2), keepdim=True)
    for layer in ("0", "0.1"):
        found = grad_cam(model.train(), layer, images, classes)
        assert found.shape == (6, 7, 5) and torch.allclose(found, expected, atol=1e-6)
    assert not model.training


def test_gradients_are_averaged_over_the_pixels() -> None:
    torch.manual_seed(0)
    features, head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Linear(4 * 6 * 6, 3)
    images, classes = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    weights = head.weight[classes].view(5, 4, 36).mean(2)[:, :, None, None]
    maps = (weights * features(images)).sum(1).relu()
    found = grad_cam(nn.Sequential(features, nn.Flatten(), head), "0", images, classes)
    assert torch.allclose(found, maps / maps.amax((1, 2), keepdim=True), atol=1e-6)


def test_where_nothing_speaks_for_the_class_all_is_cold() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    nn.init.constant_(model[4].weight, -1.0)
    assert not grad_cam(model, "1", torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 0])).any()


@pytest.mark.parametrize(("name", "expected"), [("resnet9", "layer3"), ("tiny_cnn", "features.block2.1")])
def test_the_usual_layer_is_the_last_one_before_pooling(name: str, expected: str) -> None:
    model = build_model(ModelConfig(name=name, width=4), (3, 32, 32), 10).eval()
    names = unpooled(model, map_sizes(model, torch.zeros(1, 3, 32, 32)))
    assert usual_layer(model, names) == expected


def test_of_a_transformer_it_is_the_last_whose_tokens_meet() -> None:
    images = torch.randn(2, 3, 64, 64)
    model = build_model(ModelConfig(name="timm/test_vit"), (3, 64, 64), 10).eval()
    layer = usual_layer(model, list(map_sizes(model, images)))
    assert layer == f"blocks.{len(model.blocks) - 1}.norm1"
    nn.init.normal_(model.head.weight)
    heat = grad_cam(model, layer, images, torch.tensor([1, 2]))
    assert heat.shape == (2, 4, 4) and heat.amax() == 1
