"""A look into a network, worked out by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lockstep.data.images import Data, build_data
from lockstep.evaluation.probe import look_into, probe
from lockstep.models.network import build_network
from lockstep.randomness import seed_run
from lockstep.settings.config import Config, DataConfig, ModelConfig

CPU = torch.device("cpu")


def silence(layer: nn.Module, images: torch.Tensor) -> float:
    """Of a ReLU behind a layer, in a network that ends in as many classes as the layer has channels."""
    pooled: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if images.ndim == 4 else []
    model = nn.Sequential(layer, nn.ReLU(), *pooled)
    (share,) = look_into(model, images, torch.zeros(len(images), dtype=torch.long), None).silent.values()
    return share


def test_a_channel_is_silent_if_it_is_zero_for_every_image_everywhere() -> None:
    layer = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [1.0, -1.0]]))
    assert silence(layer, torch.tensor([[1.0, 1.0], [2.0, 1.0]])) == 0.5  # the second and the third
    assert silence(layer, torch.tensor([[1.0, 1.0], [2.0, -1.0]])) == 0.25


def test_channels_of_maps_and_of_tokens_are_found() -> None:
    convolution = nn.Conv2d(1, 4, 1)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.bias.copy_(torch.tensor([1.0, -1.0, -1.0, -1.0]))  # type: ignore[union-attr]
    assert silence(convolution, torch.ones(3, 1, 2, 5)) == 0.75

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.relu = nn.Linear(2, 2, bias=False), nn.ReLU()
            nn.init.eye_(self.same.weight)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.relu(self.same(tokens)).mean(1)

    tokens = torch.tensor([[[1.0, -1.0], [1.0, -2.0], [1.0, -3.0]]])
    assert look_into(Tokens(), tokens, torch.tensor([0]), None).silent == {"relu": 0.5}


def test_gradients_of_a_layer_are_those_of_the_mean_loss() -> None:
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    seen = look_into(
        model, torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]), {"weight": torch.tensor([[3.0], [4.0]])}
    )
    # Both classes have probability 1/2: d loss / d w = mean(x) * (-1/2, 1/2) = (-1.5, 1.5).
    assert seen.gradients == {"weight": pytest.approx(1.5)}
    assert seen.moved == 1.0 and seen.images == 2 and seen.accuracy == 1.0  # of equal outputs the first counts


def test_a_look_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 2)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    look_into(model, torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]), None)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("probe")
    return build_data(Config(data=DataConfig(cache_dir=str(folder / "cache"))), folder, write=False)


def test_first_weights_have_not_moved_and_loaded_ones_are_not_asked(digits: Data, tmp_path: Path) -> None:
    config = Config(model=ModelConfig(name="tiny_cnn"))
    seed_run(0)
    model = build_network(config, digits, CPU, resumes=False)
    seen = probe(config, digits, model, 16)
    assert seen is not None and seen.moved == 0.0 and seen.images == 16
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    moved = probe(config, digits, model, 1000)
    assert moved is not None and moved.moved == pytest.approx(0.5) and moved.images == 64
    loaded = Config(model=ModelConfig(name="tiny_cnn", checkpoint="some.safetensors"))
    seen = probe(loaded, digits, model, 16)
    assert seen is not None and seen.moved is None
