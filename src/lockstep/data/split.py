"""Which training samples are held out for validation: stratified, seeded, drawn once per run and then kept."""

import hashlib
from pathlib import Path

import numpy as np

from lockstep.errors import UserError
from lockstep.files import read_json, write_json
from lockstep.settings.config import DataConfig

_STREAM = 1 << 64  # second key word of Philox: keeps these draws apart from other uses of the same seed


def draw_validation_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a stratified validation set; the same arguments give the same answer on every machine and NumPy.

    `labels` is int (N,), `fraction` lies in [0, 1). Returns sorted int64 indices (train, val) with
    `round(fraction * N)` of them in val, shared out to the classes by largest remainder; every class keeps at least
    one sample in train. Raises UserError where that cannot be. The samples are ranked by raw Philox words, whose
    stream NumPy guarantees (its `shuffle` has no such guarantee).
    """
    count = len(labels)
    quotas = _validation_counts(labels, round(fraction * count))
    if fraction > 0 and sum(quotas.values()) == 0:
        raise UserError(f"{fraction:g} of {count} training images is none: raise --data.val_fraction or set it to 0")
    ranks = np.random.Philox(key=seed + _STREAM).random_raw(count)
    held_out = np.zeros(count, dtype=bool)
    for label, quota in quotas.items():
        members = np.flatnonzero(labels == label)
        held_out[members[np.argsort(ranks[members], kind="stable")[:quota]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _validation_counts(labels: np.ndarray, total: int) -> dict[int, int]:
    classes, sizes = np.unique(labels, return_counts=True)
    if total > sizes.sum() - len(classes):
        raise UserError(
            f"cannot hold out {total} of {sizes.sum()} images and keep one of each of the {len(classes)} classes "
            "for training: lower --data.val_fraction"
        )
    exact = sizes * (total / max(sizes.sum(), 1))
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")  # largest remainder first, ties by class
    while counts.sum() < total:
        open_classes = [index for index in by_remainder if counts[index] < sizes[index] - 1]
        counts[open_classes[: total - counts.sum()]] += 1
    return {int(label): int(count) for label, count in zip(classes, counts, strict=True)}


def load_or_draw_split(
    path: Path, labels: np.ndarray, config: DataConfig, seed: int, *, write: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Read the validation split of a run from `path`, or draw it (and save it there if `write`).

    `labels` is int (N,) of the whole training split. Returns sorted int64 indices (train, val). Every process may call
    this, with `write` on one of them: what the others draw is the same. Raises UserError if the file is damaged or
    was drawn for other data, another fraction or another seed.
    """
    header = {
        "source": config.source,
        "labels_sha256": hashlib.sha256(np.ascontiguousarray(labels, dtype=np.int64).tobytes()).hexdigest(),
        "val_fraction": config.val_fraction,
        "seed": seed,
    }
    if path.exists():
        return _read(path, header, len(labels), round(config.val_fraction * len(labels)))
    train, val = draw_validation_split(labels, config.val_fraction, seed)
    if write:
        write_json(path, header | {"train_count": len(train), "val_indices": val.tolist()})
    return train, val


def _read(path: Path, header: dict[str, object], count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        saved = read_json(path)
        val = np.asarray(saved["val_indices"], dtype=np.int64)
        differing = [key for key, value in header.items() if saved[key] != value]
        train_count = saved["train_count"]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error!r}): restore it, or start over with another --run.name") from error
    ascending = val.ndim == 1 and bool(np.all(np.diff(val) > 0)) and (not len(val) or 0 <= val[0] <= val[-1] < count)
    if not ascending or len(val) != held_out or train_count != count - held_out:
        differing.append("val_indices")
    if differing:
        raise UserError(
            f"{path} was drawn for other data ({', '.join(differing)} differ): "
            "start over with another --run.name, or bring the old data back"
        )
    return np.setdiff1d(np.arange(count), val, assume_unique=True), val
