"""What layers put out: found by name, kept as it was, as maps where it is one."""

import pytest
import torch
from torch import nn

from lockstep.evaluation.activations import as_maps, embed, first_kernels, map_sizes, recorded, unpooled
from lockstep.models.network import build_model
from lockstep.settings.config import ModelConfig


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class Windows(nn.Module):
    """Four of each image, in its place in the batch."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.unflatten(2, (2, -1)).unflatten(4, (2, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def test_layers_with_maps_are_found_in_the_order_in_which_they_are_done() -> None:
    sizes = map_sizes(small(), torch.randn(2, 1, 8, 8))
    assert sizes == {"0.0": (8, 8), "0.1": (8, 8), "0.2": (4, 4), "0": (4, 4), "1": (4, 4)}
    assert unpooled(small(), sizes) == ["0.0", "0.1", "1"]
    within = nn.Sequential(nn.Conv2d(1, 16, 2, stride=2, padding=1), nn.Flatten(2), nn.Unflatten(2, (2, 10)))
    assert list(map_sizes(within, torch.zeros(2, 1, 8, 6))) == ["0"], "4 x 3 and a pixel more, but not 2 x 10"
    windows = nn.Sequential(nn.ReLU(), Windows(), nn.ReLU())
    assert list(map_sizes(windows, torch.zeros(2, 1, 8, 8))) == ["0"], "behind it, 4 windows of 4 x 4 of each image"
    assert map_sizes(build_model(ModelConfig(name="mlp"), (1, 8, 8), 3), torch.randn(2, 1, 8, 8)) == {}


def test_what_is_kept_does_not_change_afterwards_and_changes_nothing() -> None:
    model, images = small(), torch.randn(2, 1, 8, 8)
    expected = model(images)
    with recorded(model, ["0.0"]) as outputs:
        assert torch.equal(model(images), expected)
    assert (outputs["0.0"] < 0).any(), "the ReLU behind it works in place"
    assert torch.equal(outputs["0.0"], model[0][0](images))
    outputs.clear()
    model(images)
    assert not outputs


def test_features_are_what_the_last_linear_layer_is_given() -> None:
    model, images = small(), torch.randn(5, 1, 8, 8)
    logits, features = embed(model, images)
    assert torch.equal(logits, model(images)) and torch.equal(features, model[:4](images))
    headless = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    logits, features = embed(headless, images)
    assert torch.equal(logits, features)


def test_first_kernels_are_those_that_see_images() -> None:
    found = first_kernels(small(), (1, 8, 8))
    assert found is not None and found[0] == "0.0" and found[1].shape == (4, 1, 3, 3)
    found = first_kernels(build_model(ModelConfig(name="mlp", width=7), (3, 8, 6), 10), (3, 8, 6))
    assert found is not None and found[1].shape == (7, 3, 8, 6)
    assert first_kernels(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)), (1, 8, 8)) is None


@pytest.mark.parametrize("prefix", [0, 1])
def test_tokens_of_patches_are_a_map(prefix: int) -> None:
    model, layer = nn.Module(), nn.Identity()
    model.patch_embed, model.num_prefix_tokens = nn.Module(), prefix
    model.patch_embed.grid_size = (2, 3)
    tokens = torch.arange(4 * (6 + prefix) * 5.0).view(4, 6 + prefix, 5)
    maps = as_maps(model, layer, tokens)
    assert maps is not None and maps.shape == (4, 5, 2, 3)
    assert torch.equal(maps[1, :, 1, 2], tokens[1, prefix + 5])
    assert as_maps(model, layer, torch.zeros(4, 5, 5)) is None
    assert as_maps(model, layer, torch.zeros(4, 3, 6, 5)) is None, "heads of attention"


def test_channels_may_come_last() -> None:
    model = nn.Module()
    model.output_fmt = "NHWC"
    maps = as_maps(model, nn.Identity(), torch.zeros(2, 4, 6, 8))
    assert maps is not None and maps.shape == (2, 8, 4, 6)
    maps = as_maps(model, nn.Conv2d(1, 1, 1), torch.zeros(2, 4, 6, 8))
    assert maps is not None and maps.shape == (2, 4, 6, 8)
