"""Every kind of data set behind one string, `kind:name`."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lockstep.data.sources.embedded import open_embedded
from lockstep.data.sources.folder import open_folder
from lockstep.data.sources.hub import open_hub
from lockstep.data.sources.source import Source, Split
from lockstep.data.sources.synthetic import open_synthetic
from lockstep.data.sources.tar import open_tar
from lockstep.data.sources.torchvision import open_torchvision
from lockstep.data.split import draw_validation_split
from lockstep.errors import UserError, did_you_mean
from lockstep.settings.config import DataConfig

_logger = logging.getLogger(__name__)

_HELD_OUT_SEED = 0  # fixed, so that the test set never depends on run.seed

KINDS: dict[str, Callable[[str, DataConfig], Source]] = {
    "embedded": open_embedded,
    "torchvision": open_torchvision,
    "hf": open_hub,
    "folder": open_folder,
    "tar": open_tar,
    "synthetic": open_synthetic,
}
"""What stands before the colon -> what opens the rest of it"""


def open_source(config: DataConfig) -> Source:
    """Open `config.source`; nothing is decoded yet.

    A source without a test split tests on its own validation split, or, without that too, on `config.test_fraction` of
    its images, stratified and the same for all runs. Raises UserError, in one line, for an unknown kind or name,
    missing or damaged files, no network, fewer than two classes, an empty class, or a label outside the classes.
    """
    kind, _, name = config.source.partition(":")
    if kind not in KINDS or not name:
        known = ", ".join(f"{known}:..." for known in KINDS)
        raise UserError(f"--data.source={config.source!r} is not of a known kind: {known}.{did_you_mean(kind, KINDS)}")
    source = KINDS[kind](name, config)
    splits = dict(source.splits)
    for split in splits.values():
        if not len(split):
            raise UserError(f"{source.name}: the {split.name} split is empty")
        _check_labels(split, len(source.classes))
    if config.folds is not None and "val" in splits:
        raise UserError(f"--data.folds={config.folds} has no meaning for {source.name}: it has a validation split")
    if len(np.unique(splits["train"].labels)) < 2:
        raise UserError(f"{source.name}: only one class has training images: classification needs two")
    if "test" not in splits and "val" in splits:
        _logger.info("%s has no test split: its validation split is the test set too", source.name)
        splits["test"] = splits["val"]
    elif "test" not in splits and config.test_fraction > 0:
        labels = splits["train"].labels
        train, held_out = draw_validation_split(labels, config.test_fraction, _HELD_OUT_SEED, "data.test_fraction")
        splits |= {"train": splits["train"].take(train, "train"), "test": splits["train"].take(held_out, "test")}
        return replace(source, splits=splits, held_out=held_out)
    return replace(source, splits=splits)


def _check_labels(split: Split, num_classes: int) -> None:
    outside = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise UserError(
            f"{split.where(row)}: label {split.labels[row]} lies outside 0..{num_classes - 1} "
            f"({len(outside)} such labels): correct or remove them"
        )
