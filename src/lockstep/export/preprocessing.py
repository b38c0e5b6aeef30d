"""How an image becomes what an exported network takes, as `preprocessing.json` says it to any program."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.data.decoding import decode_row
from lockstep.data.images import Data
from lockstep.data.sources.source import Split, open_encoded
from lockstep.errors import UserError
from lockstep.files import read_json, write_json
from lockstep.settings.config import AugmentConfig

PREPROCESSING = "preprocessing.json"


@dataclass(frozen=True)
class Preprocessing:
    """Of one network."""

    channels: int
    height: int
    width: int
    mode: str
    """Pillow's: L or RGB"""
    resize_shorter_side: int | None
    """Bilinear and antialiased, the sides rounded; then the centre of height x width is cut out. None: no resizing"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel, of images in [0, 1]"""
    mirrored: bool
    """Probabilities are the mean of those of an image and its mirror image"""
    classes: tuple[str, ...]
    """In the order of the network's outputs"""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        return self.channels, self.height, self.width

    def pixels(self, path: Path) -> Tensor:
        """An image file as evaluation sees it, float (1, channels, height, width) in [0, 1].

        Raises UserError, naming the file, for one that cannot be read, or that has another size where none is resized.
        """
        image = Split("image", np.zeros(1, np.int64), lambda _: open_encoded(str(path)), lambda _: str(path))
        pixels = decode_row(image, 0, (self.height, self.width, self.channels), self.resize_shorter_side)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def build_preprocessing(augment: AugmentConfig, data: Data, names: list[str]) -> Preprocessing:
    """That of a run's evaluation; `names` are those of all outputs."""
    channels, height, width = data.image_shape
    mode, resize = "L" if channels == 1 else "RGB", data.test.resize_size
    mirrored = augment.tta == "flip"
    return Preprocessing(channels, height, width, mode, resize, data.mean, data.std, mirrored, tuple(names))


def write_preprocessing(folder: Path, preprocessing: Preprocessing, *, inside: bool, network: dict[str, Any]) -> None:
    """Write the file; `inside`: the network normalises. `network`: settings that tell how to build it anew."""
    said = {"layout": "NCHW", "range": [0, 1], "normalised_inside": inside, "interpolation": "bilinear"}
    write_json(folder / PREPROCESSING, {**asdict(preprocessing), **said, "network": network})


def read_preprocessing(folder: Path) -> tuple[Preprocessing, dict[str, Any]]:
    """What `write_preprocessing` wrote: the preprocessing, and the settings of the network.

    Raises UserError if there is no such file in the folder.
    """
    path = folder / PREPROCESSING
    try:
        kept = read_json(path)
        values = {name: kept[name] for name in Preprocessing.__dataclass_fields__}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return Preprocessing(**values), kept["network"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the description of an exported network: {error!r}") from error
