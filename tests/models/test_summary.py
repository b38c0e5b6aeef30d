"""The table of a network's layers."""

import pytest
import torch
from networks import COLOUR, GREY, build

from lockstep.models.summary import layer_rows, summarize_model


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


def test_layers_are_listed_without_a_pass_through_the_network() -> None:
    rows = {name: rest for name, *rest in layer_rows(build("fashion_cnn"))}
    assert rows["features.block2.0"] == ["Conv2d", "64x32x3x3", 18432]
    assert rows["head.11"] == ["Linear", "10x128", 1290]
    assert sum(count for _, _, count in rows.values()) == 354858


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
