"""`hf:<hub name or local folder>`: Hugging Face data sets."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lockstep.data.sources.source import VAL_NAMES, Source, Split, digest_of, open_encoded
from lockstep.errors import UserError
from lockstep.files import path_of
from lockstep.settings.config import DataConfig

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _HubImages:
    """A column of encoded images: {"bytes", "path"} per row."""

    dataset: Any
    column: str
    name: str

    def __call__(self, row: int) -> Image.Image:
        image = self.dataset[row][self.column]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise OSError("the image is missing")
        return open_encoded(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])

    def where(self, row: int) -> str:
        image = self.dataset[row][self.column]
        path = f" ({image['path']})" if image and image["path"] else ""
        return f"{self.name} row {row}{path}"


def open_hub(name: str, config: DataConfig) -> Source:
    """Open a data set of the hub or a local copy; raises UserError if it is out of reach or has no images or labels."""
    loaded = _load_hub(name, config)
    found = {split: next((theirs for theirs in names if theirs in loaded), None)
             for split, names in {"train": ("train",), "val": VAL_NAMES, "test": ("test",)}.items()}  # fmt: skip
    if found["train"] is None:
        raise UserError(f"{config.source} has no train split, only {', '.join(loaded)}")
    image_column, label_column = _columns(loaded["train"], config)
    splits: dict[str, Split] = {}
    for split, theirs in found.items():
        if theirs is None:
            continue
        read = _HubImages(_undecoded(loaded[theirs], image_column), image_column, f"{config.source}, {theirs}")
        labels = _column_labels(loaded[theirs], label_column, read.where)
        if split != "train" and len(labels) and (labels < 0).all():
            _logger.info("%s: the %s split has no labels and is left out", config.source, theirs)
            continue
        splits[split] = Split(split, labels, read, read.where)
    feature = loaded["train"].features[label_column]
    names = getattr(feature, "names", None) or range(int(splits["train"].labels.max(initial=0)) + 1)
    fingerprint = digest_of(*(loaded[theirs]._fingerprint.encode() for theirs in found.values() if theirs))
    if config.image_column is not None:  # which the cache of decoded images must not take for another
        fingerprint = digest_of(fingerprint.encode(), config.image_column.encode())
    content = digest_of(*(split.labels for split in splits.values()))  # the fingerprint follows the place of files
    return Source(config.source, tuple(map(str, names)), splits, fingerprint, content)


def _load_hub(name: str, config: DataConfig) -> Mapping[str, Any]:
    import datasets

    folder = path_of(name)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--data.source={config.source!r}: there is no folder {folder.resolve()}")
    try:
        with _quiet_hub():
            return datasets.load_dataset(str(folder) if folder.is_dir() else name)
    except Exception as error:  # the library raises nearly everything, down to plain UserError
        cause: BaseException = error
        while not isinstance(error, OSError) and (deeper := cause.__cause__ or cause.__context__):
            cause = deeper
        reason = " ".join(str(cause).split())[:300] or repr(cause)
        hint = (
            "check or remove its files"
            if folder.is_dir()
            else "check the name and the network, or give the path of a local copy (hf:./folder)"
        )
        raise UserError(f"--data.source={config.source!r} cannot be loaded ({reason}): {hint}") from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """No progress bars, and no line per retry: what matters is said once, by us."""
    import datasets
    import huggingface_hub.utils.logging as hub_logging

    had_bars, verbosity = datasets.are_progress_bars_disabled() is False, hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _columns(dataset: Any, config: DataConfig) -> tuple[str, str]:
    """The columns of images and of labels: the settings', else the first that look like it."""
    import datasets

    features = dataset.features
    for setting in ("image_column", "label_column"):
        if (name := getattr(config, setting)) is not None and name not in features:
            raise UserError(f"--data.{setting}={name}: {config.source} has the columns {', '.join(features)}")
    images = [name for name, feature in features.items()
              if isinstance(feature, datasets.Image)
              or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})]  # fmt: skip
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = [name for name in ("label", "labels", "fine_label") if name in features] + classes
    if config.image_column is not None and config.image_column not in images:
        raise UserError(f"--data.image_column={config.image_column} of {config.source} holds no images")
    labels = labels if config.label_column is None else [config.label_column]
    if not images or not labels:
        missing = "image" if not images else "label (ClassLabel, or an integer called label): set --data.label_column"
        raise UserError(f"{config.source} has no column of type {missing}: its columns are {', '.join(features)}")
    return config.image_column or images[0], labels[0]


def _undecoded(dataset: Any, column: str) -> Any:
    import datasets

    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _column_labels(dataset: Any, column: str, where: Callable[[int], str]) -> np.ndarray:
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise UserError(f"{where(row)}: the label is missing ({values.null_count} such rows): remove them")
    labels = values.to_numpy()
    if labels.dtype.kind not in "iub":
        raise UserError(f"{where(0)}: column {column!r} holds {values.type}, not integer labels")
    return labels.astype(np.int64)
