"""Fetch what a training needs, where there is internet: `lockstep prepare [train.py's arguments]`.

For clusters whose compute nodes have none: run it on the login node with the arguments of the job. It downloads the
data set and published weights, decodes a set that fits the cache, and says where everything went; these folders must
be ones that compute nodes see. Nothing is trained, no run folder is made, and what is there is not fetched again.
"""

import logging
from collections.abc import Sequence

import torch

from lockstep.data.images import Data, build_data
from lockstep.files import path_of
from lockstep.models.network import build_network, with_pretrained_input
from lockstep.models.summary import count_parameters
from lockstep.settings.cli import parse_config, run_dir_of
from lockstep.settings.config import Config


def prepare(config: Config) -> list[str]:
    """Fill the caches; returns lines that say what is where. Raises UserError for what is out of reach."""
    config = with_pretrained_input(config)
    data = build_data(config, run_dir_of(config), write=False)
    lines = [_describe(data, config), *_places(data, config)]
    model = build_network(config, data, torch.device("cpu"), resumes=False)
    lines.append(f"network: {config.model.name}, {count_parameters(model):,} parameters")
    if config.model.published_weights:
        from huggingface_hub.constants import HF_HUB_CACHE

        lines.append(f"published weights: {HF_HUB_CACHE} (HF_HOME moves it)")
    return lines


def _describe(data: Data, config: Config) -> str:
    sets = {"train": data.train, "val": data.val, "test": data.test}
    counts = ", ".join(f"{len(images)} {name}" for name, images in sets.items() if images)
    channels, height, width = data.image_shape
    shape = f"{height}x{width}x{channels}"
    return f"data: {config.data.source}, {counts} images of {shape} in {len(data.classes)} classes"


def _places(data: Data, config: Config) -> list[str]:
    kind, _, name = config.data.source.partition(":")
    lines = []
    if kind == "torchvision":
        lines.append(f"files: {path_of(config.data.root).resolve()} (--data.root)")
    elif kind == "hf" and not path_of(name).is_dir():
        from datasets.config import HF_DATASETS_CACHE

        lines.append(f"files: {HF_DATASETS_CACHE} (HF_HOME moves it)")
    elif kind in ("hf", "folder", "tar"):
        lines.append(f"files: {path_of(name).resolve()}")
    decoded = f"decoded images: {path_of(config.data.cache_dir).resolve()} (--data.cache_dir)"
    streams = "decoded images: none, this set streams (--data.memory_budget)"
    return [*lines, streams if data.train.images is None else decoded]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare for a command line of train.py (default: sys.argv) and print where things are."""
    config = parse_config(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lockstep").setLevel(logging.INFO)  # decoding may take minutes: say that it goes on
    print("\n".join(prepare(config)))
    return 0
