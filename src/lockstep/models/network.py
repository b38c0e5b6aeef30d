"""Networks by name: the small ones of the recipes, and every network of timm; built with first weights, on a device."""

import difflib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lockstep.augment.transform import progressive_width
from lockstep.data.images import Data
from lockstep.errors import UserError
from lockstep.files import path_of
from lockstep.models.compilation import compile_network
from lockstep.models.freeze import freeze
from lockstep.models.resnet import resnet9, resnet_basic
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
from lockstep.models.weights import fit_channels, load_weights, put_weights
from lockstep.settings.config import AugmentConfig, Config, ModelConfig
from lockstep.settings.registry import refuse_unused
from lockstep.settings.types import written


def _say_nothing(_: str) -> None:
    """For those who only look at the network."""


class Network(NamedTuple):
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
    "resnet9": Network(resnet9, frozenset({"dropout", "width", "batch_norm", "init"})),
    "resnet_basic": Network(resnet_basic, frozenset({"dropout", "width", "batch_norm", "init"})),
}
_TIMM_SETTINGS = frozenset({"dropout", "drop_path", "stem", "global_pool", "pretrained", "grad_checkpointing"})
_ALWAYS = frozenset({"name", "checkpoint", "freeze", "summary"})


def build_model(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build the network `config.name` on the CPU, with initial weights drawn from torch's global generator.

    It maps images (N, channels, height, width) of `image_shape` = (channels, height, width) to logits
    (N, num_classes). Weights of `config.checkpoint` are not loaded here, but for those of the hub.
    Raises UserError for an unknown name, for a setting that this network has no use for, for an image size that
    it cannot take, and for pretrained weights that cannot be had.
    """
    model = find_network(config).build(config, image_shape, num_classes)
    set_initial_weights(model, config.init)
    return model


def find_network(config: ModelConfig) -> Network:
    """The record of `model.name`; raises UserError if there is none, or if it has no use for a setting."""
    network = NETWORKS[config.name] if config.name in NETWORKS else _find_timm(config.name)
    if config.hub_weights is not None and config.name in NETWORKS:
        raise UserError(f"--model.checkpoint={config.checkpoint} is for networks of timm, not for {config.name}")
    optional = {setting.name for setting in fields(config)} - _ALWAYS
    refuse_unused("model.name", config, network.settings, optional)
    return network


def with_pretrained_input(config: Config) -> Config:
    """The settings, with size and normalisation of the pretrained weights' training if `augment.from_pretrained`."""
    if not config.augment.from_pretrained:
        return config
    from lockstep.models import timm_models  # here, because timm takes seconds to import

    return replace(config, augment=timm_models.pretrained_input(config.model, config.augment))


def _describe_input(augment: AugmentConfig) -> str:
    if not augment.from_pretrained:
        return "note: --augment.from_pretrained=true gives the pretrained weights images as they know them"
    size, crop = augment.image_size, augment.eval_crop
    return f"images as in the training of the published weights: {size}x{size}, augment.eval_crop={crop:g}, mean " + (
        f"{written(augment.mean)}, std {written(augment.std)}"
    )


def _find_timm(name: str) -> Network:
    from lockstep.models import timm_models  # here, because timm takes seconds to import

    timm_name = name.removeprefix("timm/")
    if name != timm_name and timm_models.is_timm_model(timm_name):
        return Network(timm_models.build_timm, _TIMM_SETTINGS)
    names = {known.removeprefix("timm/"): known for known in [*timm_models.timm_names(), *NETWORKS]}
    nearest = [names[match] for match in difflib.get_close_matches(timm_name.split(".")[0], names)]
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise UserError(
        f"--model.name={name} is unknown: {hint}Networks of ours: {', '.join(NETWORKS)}; all others: timm/<name>"
    )


def build_network(
    config: Config, data: Data, device: torch.device, *, resumes: bool, say: Callable[[str], None] = _say_nothing
) -> nn.Module:
    """The network for this data, in `runtime.dtype` and channels_last memory; the caller seeds torch first.

    Published weights, or those of `model.checkpoint`, are not fetched if the run `resumes`: a checkpoint will replace
    them. Weights for another number of classes leave the last layer as it was drawn, and `say` tells.
    Raises UserError if the network cannot take the images or the weights are another network's.
    """
    model_config = replace(config.model, pretrained=False, checkpoint=None) if resumes else config.model
    model = build_model(model_config, data.image_shape, data.num_classes)
    if (config.model.published_weights or config.augment.from_pretrained) and not resumes:
        say(_describe_input(config.augment))
    if model_config.checkpoint and not model_config.hub_weights:
        weights = load_weights(path_of(model_config.checkpoint))
        if first := fit_channels(model, weights):
            say(f"{first} of {model_config.checkpoint} is fitted to {data.image_shape[0]} channels")
        if new := put_weights(model, weights, model_config.checkpoint, new_head=True):
            say(f"{model_config.checkpoint} was for another number of classes: {' and '.join(new)} begin anew")
    if config.runtime.sync_batchnorm:
        model = convert_to_sync_batchnorm(model, device)
    frozen = freeze(model, config.model.freeze)
    if frozen and not resumes:
        say(frozen)
    model = model.to(device, getattr(torch, config.runtime.dtype)).to(memory_format=torch.channels_last)
    if config.runtime.compile != "off":
        compile_network(model, str(config.runtime.compile), path_of(config.data.cache_dir))
    return model


def load_network(
    config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int, checkpoint: Path | None
) -> nn.Module:
    """The network of a run with the weights of a checkpoint, its average if there is one, on the CPU.

    Without a checkpoint, with the weights that settings name. Raises UserError as `load_weights` does, if they are
    another network's, and if published ones are not all that the network is made of.
    """
    if checkpoint is None and config.published_weights:
        from lockstep.models import timm_models  # here, because timm takes seconds to import

        model = build_model(config, image_shape, num_classes)
        timm_models.require_whole(model, config, image_shape, num_classes)
        return model
    place = checkpoint or path_of(str(config.checkpoint))
    model = build_model(replace(config, pretrained=False, checkpoint=None), image_shape, num_classes)
    weights = load_weights(place)
    if checkpoint is None:
        fit_channels(model, weights)
    put_weights(model, weights, str(place))
    return model


def require_smaller_images(model: nn.Module, config: Config, image_shape: tuple[int, int, int]) -> None:
    """Raise UserError unless the network takes images of every size of progressive resizing, by trying."""
    channels, height, width = image_shape
    sizes = {progressive_width(config.augment, epoch, width) for epoch in range(config.train.epochs)}
    if max(sizes) > width:
        raise UserError(f"--augment.progressive_size={config.augment.progressive_size} is above the full size, {width}")
    was_training, weight = model.training, next(model.parameters())
    model.eval()
    for size in sorted(sizes - {width}):
        shape = (1, channels, round(height * size / width), size)
        try:
            with torch.no_grad():
                model.forward(weight.new_zeros(shape))  # not by a call, which would compile
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"--augment.progressive_size={config.augment.progressive_size}: {config.model.name} cannot take images "
                f"of {shape[2]}x{size}, only of {height}x{width}: take a network "
                "that ends in global pooling"
            ) from error
    model.train(was_training)


def convert_to_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Batch statistics over all processes, not the microbatch; raises UserError on a CPU: it has no such layer."""
    if device.type != "cuda":
        raise UserError(f"--runtime.sync_batchnorm=true needs GPUs, and this run is on {device.type}: leave it out")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
