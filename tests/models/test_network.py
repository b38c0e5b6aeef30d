import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lockstep.models.network import NETWORKS, build_model
from lockstep.models.resnet import ResidualBlock
from lockstep.models.summary import count_parameters, summarize_model
from lockstep.settings.config import ModelConfig

GREY, COLOUR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)
LEAST_SIZE = {"tiny_cnn": 4, "simple_cnn": 8, "fashion_cnn": 4, "cifar10_cnn": 22, "vgg_small": 4}


def build(name: str, shape: tuple[int, int, int] = GREY, classes: int = 10, **settings: Any) -> Any:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, **settings), shape, classes)


def refusal(name: str, shape: tuple[int, int, int] = GREY, **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:
        build(name, shape, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def of_type(model: nn.Module, *kinds: type) -> list[Any]:
    return [module for module in model.modules() if type(module) in kinds]


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


def test_the_summary_counts_and_leaves_the_model_alone() -> None:
    model = build("fashion_cnn")
    model.get_submodule("features.block1").eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    text = summarize_model(model, GREY)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    assert rows["features.block2.0"] == ["features.block2.0", "Conv2d", "64x14x14", "18,432"]
    assert rows["head.11"] == ["head.11", "Linear", "10", "1,290"]
    assert "parameters: 354,858" in text


def test_the_summary_counts_flops_by_hand() -> None:
    flops = 2 * (784 * 128 + 128 * 10)
    assert f"{flops / 1e6:.1f} MFLOPs" in summarize_model(build("mlp"), GREY)


def test_the_summary_restores_a_model_that_fails() -> None:
    model = build("mlp")
    with pytest.raises(RuntimeError):
        summarize_model(model, COLOUR)
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_the_summary_shows_parameters_outside_layers() -> None:
    text = summarize_model(build("timm/test_vit", COLOUR), COLOUR)
    counts = [int(line.split()[-1].replace(",", "")) for line in text.splitlines()[1:-2]]
    assert f"parameters: {sum(counts):,} " in text
    assert any(line.startswith("(top)") for line in text.splitlines())
