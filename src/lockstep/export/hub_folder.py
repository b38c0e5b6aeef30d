"""A folder in the layout of timm's repositories on the hub: `config.json` beside `model.safetensors`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lockstep.export.classifier import Classifier
from lockstep.export.preprocessing import Preprocessing, read_preprocessing
from lockstep.files import read_json
from lockstep.settings.config import ModelConfig

_OURS = "lockstep/"
"""Before the architecture of what timm cannot build"""


def describe_for_timm(classifier: Classifier, config: ModelConfig) -> dict[str, Any]:
    """What `config.json` says. `architecture` is timm's name if its network puts out the same, else lockstep/<name>."""
    preprocessing = classifier.preprocessing
    input_size, classes = list(preprocessing.shape), list(preprocessing.classes)
    described: dict[str, Any] = {
        "input_size": input_size,
        "fixed_input_size": _fixed_input_size(config),
        "interpolation": "bilinear",
        "crop_pct": _crop_share(preprocessing),
        "crop_mode": "center",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "num_classes": len(classes),
        "label_names": classes,
    }
    arguments = {"global_pool": config.global_pool} if config.global_pool else {}
    whole = {"num_classes": len(classes), "pretrained_cfg": described, "model_args": arguments}
    name = config.name.removeprefix("timm/").split(".")[0]
    # timm's network knows nothing of mirror images, which the numbers of the card rest on.
    as_timm = config.name.startswith("timm/") and not preprocessing.mirrored
    if as_timm and _is_built_by_timm(name, classifier, described, arguments):
        return {"architecture": name, **whole}
    return {"architecture": _OURS + name, **whole}


def load_by_timm(folder: Path) -> Callable[[Tensor], Tensor] | None:
    """The network of such a folder, built by timm and with its input normalised; None if timm cannot build it."""
    if not is_for_timm(folder):
        return None
    import timm  # here, because it takes seconds to import

    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return Classifier(network, read_preprocessing(folder)[0])


def is_for_timm(folder: Path) -> bool:
    """Whether timm can build the network of such a folder."""
    return not read_json(folder / "config.json")["architecture"].startswith(_OURS)


def _is_built_by_timm(name: str, classifier: Classifier, described: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Whether timm's own network has these weights: a ResNet for small images has a first layer of ours."""
    import timm

    theirs = timm.create_model(name, pretrained_cfg=described, **arguments).state_dict()
    ours = classifier.network.state_dict()
    return {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in ours.items()}


def _fixed_input_size(config: ModelConfig) -> bool:
    if not config.name.startswith("timm/"):
        return True
    import timm

    return bool(getattr(timm.get_pretrained_cfg(config.name.removeprefix("timm/")), "fixed_input_size", False))


def _crop_share(preprocessing: Preprocessing) -> float:
    """timm's `crop_pct`: it resizes to floor(size / crop_pct)."""
    size, resized = min(preprocessing.height, preprocessing.width), preprocessing.resize_shorter_side
    if resized is None:
        return 1.0
    exact = size / resized
    return exact if math.floor(size / exact) == resized else size / (resized + 0.5)
