"""Networks of timm, fitted to the data set's images and classes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.utils.logging as hub_logging
import timm
import timm.data
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from timm.models import ResNet
from torch import nn

from lockstep.errors import UserError, first_line
from lockstep.files import read_json
from lockstep.settings.config import AugmentConfig, ModelConfig

_OF_WEIGHTS = ("num_classes", "label_offset")
"""Of timm's description of a network, what may be another for other weights"""
_PRETRAINED = "--model.pretrained=true"
LARGEST_CIFAR_STEM_PIXELS = 64
"""`--model.stem=auto` keeps the resolution of images up to this size, where a 7x7/2 stem would throw it away."""


def is_timm_model(name: str) -> bool:
    """Whether timm itself defines this network: `resnet18`, `resnet18.a1_in1k`; never `hf-hub:...` or a folder."""
    return timm.is_model(name)


def timm_names() -> list[str]:
    """Every network of timm, with our prefix `timm/`, without the names of published weights."""
    return [f"timm/{name}" for name in timm.list_models()]


def build_timm(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build `timm/<name>` for images (channels, height, width); logits (N, num_classes).

    A ResNet for small images gets the stem of the CIFAR experiments in arXiv:1512.03385: a 3x3 convolution of stride
    1 and no pooling; with `pretrained` that one convolution still starts from random weights.
    Pretrained weights (also those of `config.checkpoint` if it names a hub's repository) are fitted by timm: a first
    convolution for colour to grey images, position embeddings to the size, another number of classes to a new head.
    Raises UserError for settings or image sizes that the network does not take, and for weights out of reach.
    """
    name = config.name.removeprefix("timm/")
    channels, height, width = image_shape
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    arguments |= {"drop_rate": config.dropout, "drop_path_rate": config.drop_path or None}  # timm drops a None
    arguments["global_pool"] = config.global_pool
    try:
        if _weights_config(name).fixed_input_size:
            arguments["img_size"] = (height, width)
        if config.published_weights:
            arguments |= {"pretrained": True, "pretrained_cfg_overlay": _pretrained_weights(config)}
        model = timm.create_model(name, **arguments)
        _set_stem(model, config, image_shape)
        if config.grad_checkpointing:
            _checkpoint_activations(model, config)
        _check_forward(model, image_shape, num_classes)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(_explain(error, config, image_shape)) from error
    return model


def _explain(error: Exception, config: ModelConfig, image_shape: tuple[int, int, int]) -> str:
    """One line for the user from whatever timm or torch said."""
    reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
    name = config.name.removeprefix("timm/")
    if "pretrained tag" in reason:
        return f"--model.name={config.name}: timm has no such weights; it has {_published_weights(name)}"
    for flag, argument in {"drop_path": "drop_path_rate", "dropout": "drop_rate"}.items():
        if f"argument '{argument}'" in reason:
            return f"--model.{flag} has no meaning for --model.name={config.name}: remove it"
    if config.global_pool and ("pool" in reason.lower() or not str(error)):
        return f"--model.global_pool={config.global_pool} has no meaning for --model.name={config.name}: {reason}"
    if "state_dict" in reason:
        details = " ".join(str(error).split())[:200]
        return f"the pretrained weights do not fit --model.name={config.name} with these settings: {details}"
    channels, height, width = image_shape
    usual = _weights_config(name).input_size
    return (
        f"{config.name} cannot take {height}x{width} images with {channels} channels: {reason} "
        f"(it was made for {usual[1]}x{usual[2]}: see --augment.image_size)"
    )


def _weights_config(name: str) -> Any:
    return timm.get_pretrained_cfg(name)


def _published_weights(name: str) -> str:
    return ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")) or "none for this network"


def _set_stem(model: Any, config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    is_resnet = isinstance(model, ResNet)
    if not is_resnet:
        if config.stem != "auto":
            raise UserError(f"--model.stem={config.stem} works with timm's ResNets only, not with {config.name}")
        return
    if _has_new_stem(config, image_shape):
        last: Any = model.conv1[-1] if isinstance(model.conv1, nn.Sequential) else model.conv1
        model.conv1 = nn.Conv2d(image_shape[0], last.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()


def _check_forward(model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """One image of zeros in evaluation mode: timm finds out about a bad size only when it runs."""
    like = next(model.parameters())
    model.eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype))
    model.train()
    assert logits.shape == (1, num_classes), f"logits of shape {tuple(logits.shape)}"


def require_whole(model: Any, config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Raise UserError if a part of a network with published weights has new ones: it would evaluate as chance."""
    published = int(model.pretrained_cfg.get("num_classes", num_classes))
    if published != num_classes:
        raise UserError(
            f"the weights of {config.name} are for {published} classes, and the data have {num_classes}: their outputs "
            "would be new. Name data with those classes, or fine-tune the network first"
        )
    if isinstance(model, ResNet) and _has_new_stem(config, image_shape):
        _, height, width = image_shape
        raise UserError(
            f"{config.name} has a new first layer for images of {height}x{width}: set --model.stem=imagenet, or "
            f"--augment.image_size above {LARGEST_CIFAR_STEM_PIXELS}"
        )


def _has_new_stem(config: ModelConfig, image_shape: tuple[int, int, int]) -> bool:
    small = max(image_shape[1:]) <= LARGEST_CIFAR_STEM_PIXELS
    return config.stem == "cifar" or (config.stem == "auto" and small)


def _checkpoint_activations(model: Any, config: ModelConfig) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(f"--model.grad_checkpointing=true has no meaning for --model.name={config.name}") from error


def pretrained_input(config: ModelConfig, augment: AugmentConfig) -> AugmentConfig:
    """The settings with the size, crop, mean and deviation that the network's published weights were trained with.

    What the user has set stays; a file of weights is taken for one of timm's. Raises UserError if the weights are a
    hub's, and out of reach.
    """
    if config.hub_weights:
        published = _described_on_hub(config)
    else:
        published = _weights_config(config.name.removeprefix("timm/")).to_dict()
    known = timm.data.resolve_data_config({}, pretrained_cfg=published)
    usual = AugmentConfig()
    missing: dict[str, Any] = {
        "image_size": int(known["input_size"][-1]),
        "eval_crop": float(known["crop_pct"]),
        "mean": tuple(known["mean"]),
        "std": tuple(known["std"]),
    }
    return replace(
        augment, **{name: value for name, value in missing.items() if getattr(augment, name) == getattr(usual, name)}
    )


def _pretrained_weights(config: ModelConfig) -> dict[str, Any]:
    """What timm must know of the weights to load: safetensors only, nothing pickled, no code of others."""
    name = config.name.removeprefix("timm/")
    if config.hub_weights:
        described = _described_on_hub(config)
        made_for = described.get("architecture", name)
        if made_for.split(".")[0] != name.split(".")[0]:
            raise UserError(f"--model.checkpoint={config.checkpoint} is for timm/{made_for}, not for {config.name}")
        file = _from_hub(config.hub_weights, "model.safetensors", f"--model.checkpoint={config.checkpoint}")
        return {"file": file, "custom_load": False, **{key: described[key] for key in _OF_WEIGHTS if key in described}}
    repository = _weights_config(name).hf_hub_id
    if not repository:
        raise UserError(
            f"--model.pretrained=true: timm publishes no weights for {name}; it has {_published_weights(name)}"
        )
    return {"file": _from_hub(repository, "model.safetensors", _PRETRAINED), "custom_load": False}


def _described_on_hub(config: ModelConfig) -> dict[str, Any]:
    """What timm's config.json in a hub's repository says of the weights beside it."""
    setting = f"--model.checkpoint={config.checkpoint}"
    path = _from_hub(config.hub_weights or "", "config.json", setting)
    try:
        described = read_json(Path(path))
        return described.get("pretrained_cfg", {}) | {
            key: described[key] for key in ("architecture", "num_classes") if key in described
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{setting}: its config.json is not timm's ({first_line(error)})") from error


def _from_hub(place: str, file: str, setting: str) -> str:
    """Path of a file of `place`, a repository and perhaps @revision: from the hub's cache, else from the hub."""
    repository, _, revision = place.partition("@")
    try:
        return hf_hub_download(repository, file, revision=revision or None, local_files_only=True)
    except LocalEntryNotFoundError:
        pass  # Asking the cache first spares clusters without network half a minute of retries.
    except HFValidationError as error:
        raise UserError(f"{setting} names no repository, as in hf_hub:timm/resnet18.a1_in1k") from error
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # a line per retry says less than ours
    try:
        return hf_hub_download(repository, file, revision=revision or None)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        folder = "models--" + repository.replace("/", "--")
        raise UserError(
            f"{setting}: {repository}/{file} is neither in {constants.HF_HUB_CACHE} nor within reach "
            f"({type(error).__name__}); run `hf download {repository} {file}` on a machine with network and copy the "
            f"cache folder {folder} here, or set --model.checkpoint=FILE.safetensors"
            + ("" if setting != _PRETRAINED else ", or --model.pretrained=false to train from scratch")
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)
