"""Networks of timm, fitted to the data set's images and classes."""

from typing import Any

import timm
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import ResNet
from torch import nn

from lockstep.errors import UserError
from lockstep.settings.config import ModelConfig

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
    Raises UserError for settings or image sizes that the network does not take, and for weights out of reach.
    """
    name = config.name.removeprefix("timm/")
    channels, height, width = image_shape
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    arguments |= {"drop_rate": config.dropout, "drop_path_rate": config.drop_path or None}  # timm drops a None
    try:
        if _weights_config(name).fixed_input_size:
            arguments["img_size"] = (height, width)
        if config.pretrained:
            weights = _safe_weights(name)
            arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": weights, "custom_load": False}}
        model = timm.create_model(name, **arguments)
        _set_stem(model, config, image_shape)
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
    channels, height, width = image_shape
    small = max(height, width) <= LARGEST_CIFAR_STEM_PIXELS
    if config.stem == "cifar" or (config.stem == "auto" and small):
        last: Any = model.conv1[-1] if isinstance(model.conv1, nn.Sequential) else model.conv1
        model.conv1 = nn.Conv2d(channels, last.out_channels, kernel_size=3, padding=1, bias=False)
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


def _safe_weights(name: str) -> str:
    """Path of the published weights: from the hub's cache, else from the hub; safetensors only, nothing pickled."""
    repository = _weights_config(name).hf_hub_id
    if not repository:
        raise UserError(
            f"--model.pretrained=true: timm publishes no weights for {name}; it has {_published_weights(name)}"
        )
    file = "model.safetensors"
    try:
        return hf_hub_download(repository, file, local_files_only=True)
    except LocalEntryNotFoundError:
        pass  # Asking the cache first spares clusters without network half a minute of retries.
    try:
        return hf_hub_download(repository, file)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        folder = "models--" + repository.replace("/", "--")
        raise UserError(
            f"--model.pretrained=true: {repository}/{file} is neither in {constants.HF_HUB_CACHE} nor within reach "
            f"({type(error).__name__}); run `hf download {repository} {file}` on a machine with network and copy the "
            f"cache folder {folder} here"
        ) from error
