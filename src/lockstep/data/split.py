"""Which samples are held out, and which of the others are trained on: stratified, seeded, drawn once and then kept."""

import hashlib
from pathlib import Path

import numpy as np

from lockstep.errors import UserError
from lockstep.files import read_json, write_json
from lockstep.settings.config import DataConfig

# Second key words of Philox: they keep these draws apart from one another and from other uses of the same seed.
_HELD_OUT = 1 << 64
_FEW = 2 << 64


def divide(labels: np.ndarray, config: DataConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the training and the validation set; the same arguments give the same answer on every machine and NumPy.

    `labels` is int (N,) of what is not the test set. Returns sorted int64 indices (train, val): val is a share of all
    or, with `config.folds`, one fold; train are all others or, with `config.samples_per_class`, some of them. Raises
    UserError where that cannot be.
    """
    if config.folds is not None:
        train, val = draw_fold(labels, config.folds, config.fold, seed)
    else:
        train, val = draw_validation_split(labels, config.val_fraction, seed)
    if config.samples_per_class is not None:
        train = _draw_few(labels, train, config.samples_per_class, seed)
    return train, val


def draw_validation_split(
    labels: np.ndarray, fraction: float, seed: int, setting: str = "data.val_fraction"
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a stratified validation set; `setting` is what messages call the fraction.

    `labels` is int (N,), `fraction` lies in [0, 1). Returns sorted int64 indices (train, val) with
    `round(fraction * N)` of them in val, shared out to the classes by largest remainder; every class keeps at least
    one sample in train. Raises UserError where that cannot be. The samples are ranked by raw Philox words, whose
    stream NumPy guarantees (its `shuffle` has no such guarantee).
    """
    count = len(labels)
    quotas = _held_out_counts(labels, round(fraction * count), setting)
    if fraction > 0 and sum(quotas.values()) == 0:
        raise UserError(f"{fraction:g} of {count} training images is none: raise --{setting} or set it to 0")
    ranks = _ranks(count, seed + _HELD_OUT)
    held_out = np.zeros(count, dtype=bool)
    for label, quota in quotas.items():
        members = np.flatnonzero(labels == label)
        held_out[members[np.argsort(ranks[members], kind="stable")[:quota]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def draw_fold(labels: np.ndarray, folds: int, fold: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the samples into `folds` parts; returns sorted int64 indices of all other parts and of part `fold`.

    `labels` is int (N,). Every sample is in exactly one part, and the parts differ by one sample at most, in all and in
    each class. Raises UserError if a class would have no training sample left, or a part none at all.
    """
    order = np.lexsort((_ranks(len(labels), seed + _HELD_OUT), labels))  # class by class, drawn within
    part_of = np.empty(len(labels), dtype=np.int64)
    part_of[order] = np.arange(len(labels)) % folds
    train, val = np.flatnonzero(part_of != fold), np.flatnonzero(part_of == fold)
    if not len(val) or len(np.unique(labels[train])) < len(np.unique(labels)):
        smallest = np.unique(labels, return_counts=True)[1].min()
        raise UserError(
            f"--data.folds={folds} leaves a fold without images or a class without training images: there are "
            f"{len(labels)} images, {smallest} of the smallest class"
        )
    return train, val


def _draw_few(labels: np.ndarray, train: np.ndarray, count: int, seed: int) -> np.ndarray:
    """So many of each class among the indices `train`, sorted; more of them are the same ones and others."""
    ranks = _ranks(len(labels), seed + _FEW)
    chosen = []
    for label in np.unique(labels[train]):
        members = train[labels[train] == label]
        if len(members) < count:
            raise UserError(
                f"--data.samples_per_class={count}: class {label} has only {len(members)} images to train on: lower it"
            )
        chosen.append(members[np.argsort(ranks[members], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def _ranks(count: int, key: int) -> np.ndarray:
    return np.random.Philox(key=key).random_raw(count)


def _held_out_counts(labels: np.ndarray, total: int, setting: str) -> dict[int, int]:
    classes, sizes = np.unique(labels, return_counts=True)
    if total > sizes.sum() - len(classes):
        raise UserError(
            f"cannot hold out {total} of {sizes.sum()} images and keep one of each of the {len(classes)} classes "
            f"for training: lower --{setting}"
        )
    exact = sizes * (total / max(sizes.sum(), 1))
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")  # largest remainder first, ties by class
    while counts.sum() < total:
        open_classes = [index for index in by_remainder if counts[index] < sizes[index] - 1]
        counts[open_classes[: total - counts.sum()]] += 1
    return {int(label): int(count) for label, count in zip(classes, counts, strict=True)}


_KEPT_LATER = ("test_fraction", "test_indices")
"""A run that was begun before these were written has the same test set, and a file without them"""


def load_or_draw_split(
    path: Path, labels: np.ndarray, config: DataConfig, seed: int, *, write: bool, test: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read what a run trains and validates on from `path`, or draw it (and save it there if `write`).

    `labels` is int (N,) of all that is not the test set; `test`, int (T,), are the rows of a test set that was held out
    before, for the file. Returns sorted int64 indices (train, val). Every process may call this, with `write` on one
    of them: what the others draw is the same. Raises UserError if the file is damaged or was drawn for other data,
    other settings or another seed.
    """
    header: dict[str, object] = {
        "source": config.source,
        "labels_sha256": hashlib.sha256(np.ascontiguousarray(labels, dtype=np.int64).tobytes()).hexdigest(),
        "val_fraction": config.val_fraction,
        "seed": seed,
    }
    if config.folds is not None:
        header |= {"folds": config.folds, "fold": config.fold}
    if config.samples_per_class is not None:
        header["samples_per_class"] = config.samples_per_class
    if test is not None:
        header |= {"test_fraction": config.test_fraction, "test_indices": test.tolist()}
    train, val = divide(labels, config, seed)
    if path.exists():
        return _read(path, header, len(labels), (len(train), len(val)))
    if write:
        drawn = {"train_count": len(train), "val_indices": val.tolist()}
        few = {"train_indices": train.tolist()} if config.samples_per_class is not None else {}
        write_json(path, header | drawn | few)
    return train, val


def _read(path: Path, header: dict[str, object], count: int, sizes: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    try:
        saved = read_json(path)
        val = np.asarray(saved["val_indices"], dtype=np.int64)
        others = np.setdiff1d(np.arange(count), val)
        train = np.asarray(saved.get("train_indices", others), dtype=np.int64)
        known = [key for key in header if key in saved or key not in _KEPT_LATER]
        differing = [key for key in known if saved[key] != header[key]]
        differing += [] if saved["train_count"] == sizes[0] else ["train_count"]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): restore it, or start over with another --run.name") from error
    for name, rows, size in (("train_indices", train, sizes[0]), ("val_indices", val, sizes[1])):
        ascending = rows.ndim == 1 and bool(np.all(np.diff(rows) > 0))
        if not ascending or len(rows) != size or not np.isin(rows, np.arange(count)).all():
            differing.append(name)
    if not differing and not np.isin(train, others).all():
        differing.append("train_indices")
    if differing:
        raise UserError(
            f"{path} was drawn for other data ({', '.join(differing)} differ): "
            "start over with another --run.name, or bring the old data back"
        )
    return train, val
