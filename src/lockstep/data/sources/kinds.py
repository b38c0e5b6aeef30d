"""Every kind of data set behind one string, `kind:name`."""

import logging
from collections.abc import Callable

import numpy as np

from lockstep.data.sources.embedded import open_embedded
from lockstep.data.sources.folder import open_folder
from lockstep.data.sources.hub import open_hub
from lockstep.data.sources.source import Source, Split
from lockstep.data.sources.synthetic import open_synthetic
from lockstep.data.sources.torchvision import open_torchvision
from lockstep.data.split import draw_validation_split
from lockstep.errors import UserError, did_you_mean
from lockstep.settings.config import DataConfig

_logger = logging.getLogger(__name__)

_HELD_OUT_SHARE = 0.2  # the test set of a source that has none
_HELD_OUT_SEED = 0  # fixed, so that the test set never depends on run.seed

KINDS: dict[str, Callable[[str, DataConfig], Source]] = {
    "embedded": open_embedded,
    "torchvision": open_torchvision,
    "hf": open_hub,
    "folder": open_folder,
    "synthetic": open_synthetic,
}
"""What stands before the colon -> what opens the rest of it"""


def open_source(config: DataConfig) -> Source:
    """Open `config.source`; nothing is decoded yet.

    A source without a test split tests on its own validation split, or, without that too, on a fixed stratified
    fifth of its images. Raises UserError, in one line, for an unknown kind or name, missing or damaged files, no
    network, fewer than two classes, an empty class, or a label outside the classes.
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
    if len(np.unique(splits["train"].labels)) < 2:
        raise UserError(f"{source.name}: only one class has training images: classification needs two")
    if "test" not in splits and "val" in splits:
        _logger.info("%s has no test split: its validation split is the test set too", source.name)
        splits["test"] = splits["val"]
    elif "test" not in splits:
        train, test = draw_validation_split(splits["train"].labels, _HELD_OUT_SHARE, _HELD_OUT_SEED)
        splits |= {"train": splits["train"].take(train, "train"), "test": splits["train"].take(test, "test")}
    return Source(source.name, source.classes, splits, source.fingerprint, source.content)


def _check_labels(split: Split, num_classes: int) -> None:
    outside = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise UserError(
            f"{split.where(row)}: label {split.labels[row]} lies outside 0..{num_classes - 1} "
            f"({len(outside)} such labels): correct or remove them"
        )
