"""Networks for tests: built as the settings say, or refused."""

from typing import Any

import pytest
import torch
import torch.nn as nn

from lockstep.models.network import build_model
from lockstep.settings.config import ModelConfig

GREY, COLOUR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)


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
