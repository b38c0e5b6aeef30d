"""Parts of a network that do not learn: which, and that nothing of them moves."""

import pytest
import torch
from networks import COLOUR, build
from torch import nn

from lockstep.errors import UserError
from lockstep.models.freeze import freeze, is_frozen


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_patterns_match_parameters_and_whole_layers() -> None:
    model = build("timm/test_resnet", COLOUR)
    line = freeze(model, ["layer[12]", "fc.bias", "*.bn1.weight"])
    names = frozen_names(model)
    assert {name for name, _ in model.named_parameters() if name.startswith(("layer1.", "layer2."))} < names
    assert "fc.bias" in names and "layer3.0.bn1.weight" in names
    assert not names & {"fc.weight", "layer3.0.bn1.bias", "layer3.0.conv1.weight"}
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{len(names)} of {len(list(model.parameters()))} tensors" in line and f"{learning:,} of " in line
    assert freeze(build("timm/test_resnet", COLOUR), []) == ""


def test_frozen_batch_norms_keep_their_statistics_and_use_them() -> None:
    model = build("timm/test_resnet", COLOUR)
    line = freeze(model, ["layer1", "layer2.0.bn1.weight"])
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    rest = {name for name in norms if name.startswith("layer1.")}
    assert f"the statistics of {len(rest)} batch norms" in line
    assert {name for name, layer in norms.items() if is_frozen(layer)} == rest, "one whose bias learns goes on"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    model.train()
    model(torch.randn(4, *COLOUR)).sum().backward()
    for name, layer in norms.items():
        assert layer.training != (name in rest)
        assert torch.equal(layer.running_mean, before[f"{name}.running_mean"]) == (name in rest)


def test_a_pattern_of_nothing_is_refused_with_the_nearest() -> None:
    model = build("timm/test_resnet", COLOUR)
    with pytest.raises(UserError, match=r"--model.freeze=layr1 matches no parameter\. Did you mean layer1"):
        freeze(model, ["layer1", "layr1"])
    assert frozen_names(model) == set()
