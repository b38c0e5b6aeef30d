"""Networks by name: the small ones of the recipes, and every network of timm."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch.nn as nn

from lockstep.config import ModelConfig
from lockstep.models.resnet import resnet_basic
from lockstep.models.small import (
    cifar10_cnn,
    fashion_cnn,
    mlp,
    mlp_dropout,
    set_initial_weights,
    simple_cnn,
    tiny_cnn,
    vgg_small,
)
from lockstep.models.summary import count_parameters, summarize_model
from lockstep.models.timm_models import build_timm, is_timm_model, timm_names

__all__ = ["NETWORKS", "build_model", "count_parameters", "summarize_model"]


@dataclass(frozen=True)
class Network:
    """A builder, and the settings of `ModelConfig` that mean something to it."""

    build: Callable[[ModelConfig, tuple[int, int, int], int], nn.Module]
    settings: frozenset[str]


NETWORKS = {
    "mlp": Network(mlp, frozenset({"width", "noise", "init"})),
    "mlp_dropout": Network(mlp_dropout, frozenset({"dropout", "hidden", "batch_norm", "noise", "init"})),
    "tiny_cnn": Network(tiny_cnn, frozenset({"dropout", "width", "init"})),
    "simple_cnn": Network(simple_cnn, frozenset({"dropout", "width", "noise", "init"})),
    "fashion_cnn": Network(fashion_cnn, frozenset({"dropout", "width", "batch_norm", "noise", "init"})),
    "cifar10_cnn": Network(cifar10_cnn, frozenset({"dropout", "width", "batch_norm", "noise", "init"})),
    "vgg_small": Network(vgg_small, frozenset({"dropout", "width", "noise", "init"})),
    "resnet_basic": Network(resnet_basic, frozenset({"dropout", "width", "batch_norm", "init"})),
}
_TIMM = Network(build_timm, frozenset({"dropout", "drop_path", "stem", "pretrained"}))
_ALWAYS = frozenset({"name", "checkpoint", "summary"})


def build_model(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build the network `config.name` on the CPU, with initial weights drawn from torch's global generator.

    It maps images (N, channels, height, width) of `image_shape` = (channels, height, width) to logits
    (N, num_classes). Weights of `config.checkpoint` are not loaded here.
    Raises ValueError for an unknown name, for a setting that this network has no use for, for an image size that
    it cannot take, and for pretrained weights that cannot be had.
    """
    network = _find_network(config.name)
    _refuse_unused_settings(config, network)
    model = network.build(config, image_shape, num_classes)
    set_initial_weights(model, config.init)
    return model


def _find_network(name: str) -> Network:
    timm_name = name.removeprefix("timm/")
    if name in NETWORKS:
        return NETWORKS[name]
    if name != timm_name and is_timm_model(timm_name):
        return _TIMM
    names = {known.removeprefix("timm/"): known for known in [*timm_names(), *NETWORKS]}
    nearest = [names[match] for match in difflib.get_close_matches(timm_name.split(".")[0], names)]
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ValueError(
        f"--model.name={name} is unknown: {hint}Networks of ours: {', '.join(NETWORKS)}; all others: timm/<name>"
    )


def _refuse_unused_settings(config: ModelConfig, network: Network) -> None:
    for setting in fields(config):
        allowed = setting.name in network.settings or setting.name in _ALWAYS
        if not allowed and getattr(config, setting.name) != setting.default:
            raise ValueError(
                f"--model.{setting.name} has no meaning for --model.name={config.name}: remove it "
                f"(this network takes {', '.join(sorted(network.settings))})"
            )
