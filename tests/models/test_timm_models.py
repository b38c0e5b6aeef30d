"""Networks of timm: stems, image sizes, published weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from networks import COLOUR, build, refusal


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


def test_pretrained_weights_come_from_the_cache_as_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal("timm/test_resnet", (3, 96, 96), pretrained=True)
    assert str(tmp_path) in message and "hf download timm/test_resnet.r160_in1k model.safetensors" in message
    assert "models--timm--test_resnet.r160_in1k" in message

    published: Any = timm.create_model("test_resnet")
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    save_file(published.state_dict(), repository / "snapshots" / "0" / "model.safetensors")
    model = build("timm/test_resnet", (3, 96, 96), classes=7, pretrained=True)
    assert torch.equal(model.layer2[0].conv1.weight, published.layer2[0].conv1.weight)
    assert model.fc.weight.shape[0] == 7


def test_pretrained_needs_published_weights() -> None:
    assert "publishes no weights for resnet200" in refusal("timm/resnet200", COLOUR, pretrained=True)
