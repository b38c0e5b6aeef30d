"""Fetch what a training needs, where there is internet: `lockstep prepare [train.py's arguments]`.

For clusters whose compute nodes have none: run it on the login node with the arguments of the job. It downloads the
data set and published weights, decodes a set that fits the cache, checks every decoded image, and says where everything
went; these folders must be ones that compute nodes see. Nothing is trained, no run folder is made, and what is there is
not fetched again.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from lockstep.data.decoding import SKIP, UnreadableImage, open_image
from lockstep.data.images import SKIPPED_LABEL, Data, build_data
from lockstep.data.sources.kinds import Split, open_source
from lockstep.errors import UserError
from lockstep.files import path_of
from lockstep.launch.copies import map_over_cores
from lockstep.models.network import build_network, with_pretrained_input
from lockstep.models.summary import count_parameters
from lockstep.settings.cli import parse_config, run_dir_of
from lockstep.settings.config import Config

_logger = logging.getLogger(__name__)

_TASK = 256  # images that one core looks at before it is asked for the next


def prepare(config: Config) -> list[str]:
    """Fill the caches; returns lines that say what is where. Raises UserError for what is out of reach.

    Where an image is broken, all are looked at, and each that is gets a line before that.
    """
    config = with_pretrained_input(config)
    try:
        data = build_data(config, run_dir_of(config), write=False)
    except UnreadableImage as error:
        raise _all_broken(config) from error
    lines = [_describe(data, config), *_places(data, config), *_checked(data), *_skipped(data)]
    model = build_network(config, data, torch.device("cpu"), resumes=False)
    lines.append(f"network: {config.model.name}, {count_parameters(model):,} parameters")
    if config.model.published_weights:
        from huggingface_hub.constants import HF_HUB_CACHE

        lines.append(f"published weights: {HF_HUB_CACHE} (HF_HOME moves it)")
    return lines


def _all_broken(config: Config) -> UserError:
    """Tell of every image that cannot be decoded; returns what to say of them together."""
    splits = list({id(split): split for split in open_source(config.data).splits.values()}.values())
    _logger.warning("an image is broken: looking at all %d", sum(map(len, splits)))
    count = 0
    for line in chain.from_iterable(map(_broken_images, splits)):
        _logger.warning("%s", line)
        count += 1
    return UserError(f"{count} image{'s' * (count > 1)} cannot be decoded, listed above: replace or remove, or {SKIP}")


def _broken_images(split: Split) -> Iterator[str]:
    """A line for each image that cannot be decoded."""

    def look(rows: range) -> list[str]:
        lines = []
        for row in rows:
            try:
                open_image(split, row)
            except UnreadableImage as error:
                lines.append(str(error).removesuffix(f", or {SKIP}"))
        return lines

    rows = range(len(split))
    yield from chain.from_iterable(map_over_cores(look, [rows[at : at + _TASK] for at in range(0, len(split), _TASK)]))


def _checked(data: Data) -> list[str]:
    """Check all decoded images, those that were there before too; a line that says so."""
    sets = (data.train, data.val, data.test)
    decoded = {id(part.images): part.images for part in sets if part is not None and part.images is not None}
    for images in decoded.values():
        images.check()
    return [f"checked: {sum(map(len, decoded.values()))} decoded images"] if decoded else []


def _skipped(data: Data) -> list[str]:
    """A line for each image that was decoded for the cache and is skipped."""
    sets = [images for images in (data.train, data.val, data.test) if images is not None]
    places = [(images, int(index)) for images in sets for index in (images.labels == SKIPPED_LABEL).nonzero()]
    return list(dict.fromkeys(f"skipped: {images.split.where(int(images.rows[index]))}" for images, index in places))


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
