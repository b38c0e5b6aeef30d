"""The network of a run: built, with its first weights, on its device."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lockstep.batchnorm import convert_to_sync_batchnorm
from lockstep.checkpoint import load_weights, put_weights
from lockstep.config import Config
from lockstep.data import Data
from lockstep.models import build_model


def build_network(config: Config, data: Data, device: torch.device, *, resumes: bool) -> nn.Module:
    """The network for this data, in `runtime.dtype` and channels_last memory; the caller seeds torch first.

    Published weights, or those of `model.checkpoint`, are not fetched if the run `resumes`: a checkpoint will replace
    them. Raises ValueError if the network cannot take the images or the weights are another network's.
    """
    model_config = replace(config.model, pretrained=False) if resumes else config.model
    model = build_model(model_config, data.image_shape, data.num_classes)
    if config.model.checkpoint and not resumes:
        put_weights(model, load_weights(Path(config.model.checkpoint)), config.model.checkpoint)
    if config.runtime.sync_batchnorm:
        model = convert_to_sync_batchnorm(model, device)
    model = model.to(device, getattr(torch, config.runtime.dtype)).to(memory_format=torch.channels_last)
    if config.runtime.compile:
        # In place: the names of the weights, and so checkpoints, stay as they are. Dropout draws as without compiling.
        model.compile(options={"fallback_random": True})
    return model
