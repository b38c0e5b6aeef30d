"""The network as it leaves the house: images in [0, 1] in, logits out; and back from an exported folder."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.augment.transform import mean_with_mirrored
from lockstep.errors import UserError
from lockstep.export.preprocessing import Preprocessing, read_preprocessing
from lockstep.models.network import build_model
from lockstep.models.weights import load_weights, put_weights
from lockstep.settings.config import ModelConfig

WEIGHTS = "model.safetensors"


class Classifier(nn.Module):
    """Float images (N, C, H, W) in [0, 1] to logits (N, classes): normalisation, then the network, in evaluation mode.

    With `mirrored`, the logarithms of the mean probabilities of each image and its mirror image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name)).view(-1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images - self.mean) / self.std
        return mean_with_mirrored(self.network, pixels) if self.preprocessing.mirrored else self.network(pixels)

    @torch.no_grad()
    def classify(self, path: str | Path) -> dict[str, float]:
        """The probability of each class for an image file, likeliest first."""
        probabilities = self(self.preprocessing.pixels(Path(path)))[0].softmax(0)
        order = probabilities.argsort(descending=True).tolist()
        return {self.preprocessing.classes[index]: float(probabilities[index]) for index in order}


def settings_of_network(config: ModelConfig) -> dict[str, Any]:
    """The settings that shape the network, where they differ from the defaults; its weights are their own matter."""
    config = replace(config, pretrained=False, checkpoint=None, freeze=(), grad_checkpointing=False, summary=False)
    default = asdict(ModelConfig())
    return {key: value for key, value in asdict(config).items() if key == "name" or value != default[key]}


def load_exported(folder: str | Path) -> Classifier:
    """The network of a folder that `lockstep export --to safetensors` or `hub-folder` wrote, on the CPU.

    Raises UserError for a folder without one.
    """
    place = Path(folder)
    preprocessing, settings = read_preprocessing(place)
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    try:
        config = ModelConfig(**values)
    except TypeError as error:
        raise UserError(f"{place} holds a network of another version of lockstep: {error}") from error
    network = build_model(config, preprocessing.shape, len(preprocessing.classes))
    put_weights(network, load_weights(place / WEIGHTS), str(place))
    return Classifier(network, preprocessing)
