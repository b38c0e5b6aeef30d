"""Networks of timm: stems, image sizes, published weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from hub import put_on_hub
from networks import COLOUR, build, refusal

from lockstep.models.network import with_pretrained_input
from lockstep.settings.config import AugmentConfig, Config, ModelConfig


def test_the_stem_of_timm_resnets_follows_the_image_size() -> None:
    assert build("timm/resnet18", COLOUR).conv1.stride == (1, 1)
    assert isinstance(build("timm/resnet18", (3, 64, 64)).maxpool, nn.Identity)
    assert build("timm/resnet18", (3, 65, 65)).conv1.stride == (2, 2)
    assert build("timm/resnet18", COLOUR, stem="imagenet").conv1.kernel_size == (7, 7)
    deep = build("timm/resnet10t", (1, 96, 96), stem="cifar")
    assert deep.conv1.weight.shape == (64, 1, 3, 3)


def test_timm_takes_dropout_drop_path_and_image_size() -> None:
    model = build("timm/test_resnet", COLOUR, dropout=0.3, drop_path=0.2)
    assert model.training and model.drop_rate == 0.3
    assert max(getattr(module, "drop_prob", 0) or 0 for module in model.modules()) == pytest.approx(0.2)
    assert build("timm/test_vit", (1, 48, 64)).eval()(torch.zeros(1, 1, 48, 64)).shape == (1, 10)


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/densenet121"])
def test_timm_says_which_size_it_cannot_take(name: str) -> None:
    message = refusal(name, (3, 9, 9))
    assert f"{name} cannot take 9x9 images with 3 channels" in message and "it was made for" in message


def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_pretrained_weights_come_from_the_cache_as_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    offline(tmp_path, monkeypatch)
    message = refusal("timm/test_resnet", (3, 96, 96), pretrained=True)
    assert str(tmp_path) in message and "hf download timm/test_resnet.r160_in1k model.safetensors" in message
    assert "models--timm--test_resnet.r160_in1k" in message
    assert "--model.checkpoint=FILE.safetensors, or --model.pretrained=false" in message

    published: Any = timm.create_model("test_resnet")
    put_on_hub(published, tmp_path, "timm--test_resnet.r160_in1k")
    model = build("timm/test_resnet", (3, 96, 96), classes=7, pretrained=True)
    assert torch.equal(model.layer2[0].conv1.weight, published.layer2[0].conv1.weight)
    assert model.fc.weight.shape[0] == 7


def test_a_file_of_weights_takes_the_place_of_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(tmp_path, monkeypatch)
    build("timm/test_resnet", (3, 96, 96), classes=7, pretrained=True, checkpoint="own.safetensors")


def test_grey_images_and_the_same_classes_take_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first convolution for colour sees grey as three equal channels."""
    import timm

    offline(tmp_path, monkeypatch)
    published: Any = timm.create_model("test_resnet").eval()
    put_on_hub(published, tmp_path, "timm--test_resnet.r160_in1k")
    model = build("timm/test_resnet", (1, 96, 96), classes=1000, pretrained=True).eval()
    grey = torch.rand(2, 1, 96, 96)
    torch.testing.assert_close(model(grey), published(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_may_be_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of classes than timm's own weights of the name; only what its config.json describes."""
    import timm

    offline(tmp_path, monkeypatch)
    place = "hf_hub:me/pets"
    message = refusal("timm/test_resnet", (3, 96, 96), checkpoint=place)
    assert "hf download me/pets" in message and "--model.pretrained" not in message
    assert "names no repository" in refusal("timm/test_resnet", (3, 96, 96), checkpoint="hf_hub:a b/c")
    published: Any = timm.create_model("test_resnet", num_classes=5)
    sizes = {"input_size": [3, 128, 128], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    put_on_hub(published, tmp_path, "me--pets", architecture="test_resnet", num_classes=5, pretrained_cfg=sizes)
    same = build("timm/test_resnet", (3, 96, 96), classes=5, checkpoint=place)
    assert torch.equal(same.fc.weight, published.fc.weight)
    other = build("timm/test_resnet", (3, 96, 96), classes=7, checkpoint=place)
    assert other.fc.weight.shape[0] == 7 and torch.equal(other.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
    assert "is for timm/test_resnet, not for timm/resnet18" in refusal("timm/resnet18", COLOUR, checkpoint=place)
    assert "is for networks of timm" in refusal("fashion_cnn", COLOUR, checkpoint=place)
    config = Config(
        model=ModelConfig(name="timm/test_resnet", checkpoint=place), augment=AugmentConfig(from_pretrained=True)
    )
    filled = with_pretrained_input(config).augment
    assert (filled.image_size, filled.eval_crop, filled.mean, filled.std) == (
        *(128, 0.9, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    )


def test_images_are_those_that_pretrained_weights_know_where_nothing_else_is_said() -> None:
    model = ModelConfig(name="timm/test_resnet", pretrained=True)
    config = Config(model=model, augment=AugmentConfig(from_pretrained=True, flip=True))
    filled = with_pretrained_input(config)
    assert filled == replace(
        config, augment=replace(config.augment, image_size=160, eval_crop=0.95, mean=(0.5,) * 3, std=(0.5,) * 3)
    )
    assert with_pretrained_input(filled) == filled
    own = AugmentConfig(from_pretrained=True, image_size=64, mean=(0.1,), std=(0.2,))
    kept = with_pretrained_input(Config(model=model, augment=own)).augment
    assert (kept.image_size, kept.mean, kept.std) == (64, (0.1,), (0.2,))
    file = replace(model, checkpoint="own.safetensors")
    assert with_pretrained_input(replace(config, model=file)).augment == filled.augment
    plain = Config(model=model)
    assert with_pretrained_input(plain) is plain


def test_pooling_can_be_chosen() -> None:
    model = build("timm/test_resnet", COLOUR, global_pool="catavgmax")
    assert model.fc.in_features == 2 * build("timm/test_resnet", COLOUR).fc.in_features
    message = refusal("timm/test_resnet", COLOUR, global_pool="sum")
    assert message.startswith("--model.global_pool=sum has no meaning for --model.name=timm/test_resnet")
    assert "global_pool=sum has no meaning" in refusal("timm/test_vit", (3, 160, 160), global_pool="sum")


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit"])
def test_activations_computed_anew_give_the_same_bits(name: str) -> None:
    """Dropout, drop-path, gradients and batch statistics included."""
    gradients, states = [], []
    for anew in (False, True):
        model = build(name, (3, 64, 64), dropout=0.2, drop_path=0.3, grad_checkpointing=anew)
        assert model.grad_checkpointing is anew
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # as in training here
        torch.manual_seed(3)
        model(torch.randn(4, 3, 64, 64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        states.append({key: value for key, value in model.state_dict().items() if "num_batches" not in key})
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_networks_that_cannot_compute_activations_anew_say_so() -> None:
    message = "--model.grad_checkpointing=true has no meaning for --model.name=timm/selecsls42"
    assert refusal("timm/selecsls42", (3, 64, 64), grad_checkpointing=True) == message
    assert "grad_checkpointing=true has no meaning" in refusal("fashion_cnn", COLOUR, grad_checkpointing=True)


def test_pretrained_needs_published_weights() -> None:
    assert "publishes no weights for resnet200" in refusal("timm/resnet200", COLOUR, pretrained=True)
