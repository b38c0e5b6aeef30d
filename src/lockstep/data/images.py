"""The training, validation and test images of a run: decoded and in memory, or read one by one."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lockstep.data.cache import ImageCache
from lockstep.data.crop import read_crop
from lockstep.data.decoded import DecodedImages
from lockstep.data.decoding import UnreadableImage, channels_of, decode_row, open_image
from lockstep.data.sources.kinds import Source, Split, open_source
from lockstep.data.sources.source import Identity, spread
from lockstep.data.split import divide, load_or_draw_split
from lockstep.errors import UserError
from lockstep.settings.config import AugmentConfig, Config, DataConfig

_logger = logging.getLogger(__name__)

SKIPPED_LABEL = -100  # what torch's losses ignore by default
_PROBES = 32  # images looked at to learn size and channels
# Of ImageNet's training images, the field's usual constants; grey is the mean over the channels.
_IMAGENET_MEAN = {3: (0.485, 0.456, 0.406), 1: (0.449,)}
_IMAGENET_STD = {3: (0.229, 0.224, 0.225), 1: (0.226,)}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Samples for training or evaluation.

    Sample i has label `labels[i]` (int64 (N,), -100 where the image was skipped) and is row `rows[i]` (int64 (N,)) of
    `split`. `images` are those of all rows of the split, so that its pixels are `images.take(rows[[i]])` and
    subsets share them; None for a streamed set. `shape` is (C, H, W).
    """

    split: Split
    rows: Tensor
    labels: Tensor
    images: DecodedImages | None
    shape: tuple[int, int, int]
    resize_size: int | None
    on_error: Literal["raise", "skip"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def drawn_labels(self) -> np.ndarray:
        """Labels of all samples, also of those whose image was skipped: what the order of training is drawn from."""
        return self.split.labels[self.rows.numpy()]

    def subset(self, indices: Tensor | np.ndarray) -> "ImageSet":
        """The samples at `indices`, int (K,), in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return dataclasses.replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def load(self, index: int) -> Tensor | None:
        """Sample `index` as evaluation sees it, uint8 (H, W, C); None if it is skipped.

        Raises UserError naming the image if it is unreadable and `on_error` is "raise", or has another size.
        """
        row = int(self.rows[index])
        if self.images is not None:
            return None if self.labels[index] == SKIPPED_LABEL else self.images.take(self.rows[index].view(1))[0]
        channels, height, width = self.shape
        try:
            return torch.from_numpy(decode_row(self.split, row, (height, width, channels), self.resize_size).copy())
        except UnreadableImage:
            if self.on_error == "raise":
                raise
            return None

    def crop(self, index: int, draws: Sequence[float], min_area: float) -> Tensor | None:
        """A random resized crop of sample `index`, by its row of `crop_draws`, from the full image; else as `load`."""
        channels, height, width = self.shape
        try:
            return read_crop(self.split, int(self.rows[index]), (height, width, channels), draws, min_area)
        except UnreadableImage:
            if self.on_error == "raise":
                raise
            return None


@dataclass(frozen=True, eq=False)
class Data:
    """All images of a run, and what networks need to know of them.

    `val` is None without a validation split. `mean` and `std` are per channel, for pixels in [0, 1]. `num_classes` may
    exceed `len(classes)` if the settings say so.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    identity: Identity
    """The source's"""


@dataclass(frozen=True)
class _Geometry:
    """Size of all images in the network's eyes, and whether the files hold larger ones."""

    shape: tuple[int, int, int]  # H, W, C
    resize_size: int | None
    shrinks: bool


def build_data(
    config: Config, run_dir: Path | None, *, write: bool, accept: Callable[[Identity], None] | None = None
) -> Data:
    """Open the data set, choose between memory and streaming, and split off the validation samples.

    Sets whose decoded images fit `data.memory_budget` together are decoded once into `data.cache_dir`; larger ones
    stream, and so does a training set whose random crops need more than the cached pixels. Every process of a run calls
    this; one, with `write`, leaves `split.json` in `run_dir` (None: data that no run has drawn from). `accept` sees the
    identity of the source before anything is decoded or written, and may raise. Raises UserError, in one line, for all
    that is wrong with the data or does not fit the settings.
    """
    source = open_source(config.data)
    if accept is not None:
        accept(source.identity)
    num_classes = config.data.num_classes or len(source.classes)
    if num_classes < len(source.classes):
        raise UserError(f"--data.num_classes={num_classes}, but {source.name} has {len(source.classes)} classes")
    geometry = _look_at(source.splits["train"], config.data, config.augment)
    sets = _image_sets(source, geometry, config)
    train, val = _divided(source, sets, config, run_dir, write=write)
    if (test := sets.get("test", val)) is None:
        raise UserError(f"{source.name} has nothing to test on: raise --data.test_fraction or --data.val_fraction")
    height, width, channels = geometry.shape
    mean, std = _normalization(train, channels, config.augment)
    image_shape = (channels, height, width)
    return Data(train, val, test, source.classes, image_shape, num_classes, mean, std, source.identity)


def find_decoded(config: Config) -> dict[str, DecodedImages | None]:
    """Of each split that `build_data` would keep in memory, the images that an earlier start has decoded, if it did."""
    source = open_source(config.data)
    geometry = _look_at(source.splits["train"], config.data, config.augment)
    splits = _fitting(source, geometry, config)
    return {split.name: _cache(split, geometry, config.data, source.fingerprint).find() for split in splits}


def _divided(
    source: Source, sets: dict[str, ImageSet], config: Config, run_dir: Path | None, *, write: bool
) -> tuple[ImageSet, ImageSet | None]:
    """What is trained and validated on; `split.json` in `run_dir` keeps what was drawn for it."""
    division = source.division(config.data)
    if not (division.val_fraction or division.folds or division.samples_per_class or source.held_out is not None):
        return sets["train"], sets.get("val")
    labels, seed = source.splits["train"].labels, config.run.seed
    if run_dir is None:
        train, val = divide(labels, division, seed)
    else:
        path = run_dir / "split.json"
        train, val = load_or_draw_split(path, labels, division, seed, write=write, test=source.held_out)
    drawn = sets["train"].subset(val) if len(val) else None
    return sets["train"].subset(train), sets.get("val", drawn)


def _look_at(split: Split, data: DataConfig, augment: AugmentConfig) -> _Geometry:
    """Learn size and channels from a few images spread over the split: the first one's size, colour if any has it."""
    images = []
    for row in spread(len(split), _PROBES):
        try:
            images.append(open_image(split, row))
        except UnreadableImage:
            if data.on_error == "raise":
                raise
    if not images:
        raise UserError(f"{data.source}: none of {_PROBES} images looked at can be decoded")
    channels = max(map(channels_of, images))
    size = augment.image_size
    if size is None:
        if augment.eval_crop < 1:
            raise UserError(f"--augment.eval_crop={augment.eval_crop} needs --augment.image_size")
        return _Geometry((images[0].height, images[0].width, channels), None, shrinks=False)
    shrinks = any(max(image.size) > size for image in images)
    return _Geometry((size, size, channels), round(size / augment.eval_crop), shrinks)


def _image_sets(source: Source, geometry: _Geometry, config: Config) -> dict[str, ImageSet]:
    """Every split of the source, decoded or streamed; splits that are one object stay one."""
    fitting = set(map(id, _fitting(source, geometry, config)))
    sets = {}
    for split in source.splits.values():
        if id(split) not in sets:
            fingerprint = source.fingerprint if id(split) in fitting else None
            sets[id(split)] = _image_set(split, geometry, config.data, fingerprint)
    return {name: sets[id(split)] for name, split in source.splits.items()}


def _fitting(source: Source, geometry: _Geometry, config: Config) -> list[Split]:
    """The splits that are decoded, once each; a training set whose random crops need larger pixels is none of them."""
    train_streams = config.augment.resized_crop > 0 and geometry.shrinks
    unique = {id(split): split for split in source.splits.values()}.values()
    splits = [split for split in unique if not (train_streams and split is source.splits["train"])]
    fits = sum(map(len, splits)) * int(np.prod(geometry.shape)) <= config.data.memory_budget * 2**30
    return splits if fits else []


def _cache(split: Split, geometry: _Geometry, data: DataConfig, fingerprint: str) -> ImageCache:
    return ImageCache(split, geometry.shape, geometry.resize_size, data.on_error, fingerprint, data.cache_dir)


def _image_set(split: Split, geometry: _Geometry, data: DataConfig, fingerprint: str | None) -> ImageSet:
    """One split, decoded if the `fingerprint` for its cache file is given."""
    labels = torch.from_numpy(split.labels.copy())
    images = None
    if fingerprint is not None:
        images, skipped = _cache(split, geometry, data, fingerprint).images()
        labels[torch.from_numpy(skipped)] = SKIPPED_LABEL
        if skipped.any():
            first = split.where(int(np.flatnonzero(skipped)[0]))
            _logger.warning("%s: %d of %d images skipped, the first: %s", split.name, skipped.sum(), len(split), first)
    height, width, channels = geometry.shape
    rows = torch.arange(len(split))
    return ImageSet(split, rows, labels, images, (channels, height, width), geometry.resize_size, data.on_error)


def _normalization(
    train: ImageSet, channels: int, augment: AugmentConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation: the settings', measured, or ImageNet's for a streamed set."""
    if augment.mean is not None and augment.std is not None:
        grey = augment.from_pretrained and channels == 1  # which is the mean over the channels
        if {len(augment.mean), len(augment.std)} - {1, 3 if grey else channels}:
            raise UserError(f"--augment.mean and --augment.std need 1 or {channels} values, one per channel")
        if grey:
            return (sum(augment.mean) / len(augment.mean),), (sum(augment.std) / len(augment.std),)
        return augment.mean * (channels // len(augment.mean)), augment.std * (channels // len(augment.std))
    if train.images is None:
        return _IMAGENET_MEAN[channels], _IMAGENET_STD[channels]
    return _measure(train.images, train.rows[train.labels != SKIPPED_LABEL], math.prod(train.shape[1:]))


def _measure(images: DecodedImages, rows: Tensor, area: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of those of `images`, of `area` pixels each, / 255.

    A constant channel gets deviation 1.
    """
    total, squares = images.sums(rows)  # whole numbers, exact
    count = len(rows) * area
    mean = total / count
    variance = squares / count - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return tuple((mean / 255).tolist()), tuple(np.where(std > 0, std / 255, 1.0).tolist())
