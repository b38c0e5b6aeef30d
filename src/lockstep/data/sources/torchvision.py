"""`torchvision:<Name>`: the image classification sets that torchvision can download."""

import contextlib
import errno
import gzip
import inspect
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lockstep.data.sources.source import RowName, Source, Split, digest_of
from lockstep.errors import UserError, did_you_mean
from lockstep.files import path_of, replace_file
from lockstep.lease import held
from lockstep.settings.config import DataConfig

# Data sets with a `split` argument instead of `train`: ours -> theirs.
_TORCHVISION_SPLITS: dict[str, dict[str, str]] = {
    "SVHN": {"train": "train", "test": "test"},
    "STL10": {"train": "train", "test": "test"},
    "DTD": {"train": "train", "val": "val", "test": "test"},
    "Flowers102": {"train": "train", "val": "val", "test": "test"},
    "FGVCAircraft": {"train": "train", "val": "val", "test": "test"},
    "Food101": {"train": "train", "test": "test"},
    "OxfordIIITPet": {"train": "trainval", "test": "test"},
}

_PACKAGED = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}
"""Where Linux distributions put a set: Debian's package is dataset-fashion-mnist"""


@dataclass(frozen=True, eq=False)
class _Torchvision:
    dataset: Any

    def __call__(self, row: int) -> Image.Image:
        return self.dataset[row][0]


def _torchvision_arguments() -> dict[str, dict[str, dict[str, Any]]]:
    """name -> split -> arguments, for the image classification sets that torchvision can download."""
    from torchvision import datasets

    known: dict[str, dict[str, dict[str, Any]]]
    known = {name: {ours: {"split": theirs} for ours, theirs in splits.items()}
             for name, splits in _TORCHVISION_SPLITS.items()}  # fmt: skip
    for name, thing in vars(datasets).items():
        parameters = inspect.signature(thing).parameters if inspect.isclass(thing) else {}
        if {"train", "download", "target_transform"} <= parameters.keys() and name != "Kitti":  # Kitti has boxes
            known[name] = {"train": {"train": True}, "test": {"train": False}}
    return known


def open_torchvision(name: str, config: DataConfig) -> Source:
    """Open, or download, the set of that name; raises UserError if it is unknown, damaged or out of reach."""
    from torchvision import datasets

    known = _torchvision_arguments()
    if name not in known:
        near = did_you_mean(name, known) or f" Known: {', '.join(sorted(known))}"
        raise UserError(f"--data.source={config.source!r}: no such torchvision data set.{near}")
    root = path_of(config.root)
    splits, digests = {}, [name]
    for split, arguments in known[name].items():
        dataset = _load_torchvision(getattr(datasets, name), root, arguments)
        labels = next(getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key))
        labels = np.asarray(labels, dtype=np.int64)
        splits[split] = Split(split, labels, _Torchvision(dataset), RowName(config.source, split))
        digests.append(digest_of(labels, np.asarray(getattr(dataset, "data", ()))))
    classes = getattr(dataset, "classes", None) or range(int(splits["train"].labels.max()) + 1)
    return Source(config.source, tuple(map(str, classes)), splits, digest_of(*(digest.encode() for digest in digests)))


def _load_torchvision(dataset_class: Any, root: Path, arguments: Mapping[str, Any]) -> Any:
    """Open what is there; else what the system has, or download it. One process does, the others then find it."""
    name = f"torchvision:{dataset_class.__name__}"
    folder = _torchvision_folder(dataset_class, root)
    with _locked(root / f".{dataset_class.__name__}.lock"):
        try:
            return dataset_class(root, download=False, **arguments)
        except (
            Exception
        ) as error:  # a damaged file can end in any error; absence, or a wrong checksum, reads "not found"
            if not isinstance(error, FileNotFoundError) and "not found" not in str(error):
                raise UserError(f"{name}: the files in {folder} are damaged: remove them and start again") from error
        try:
            return dataset_class(root, download=not _unpack_package(dataset_class, folder), **arguments)
        except Exception as error:
            reason = " ".join(str(error).split()) or repr(error)
            raise UserError(
                f"{name} is not in {folder} and cannot be downloaded ({reason}): "
                "put its files there, set --data.root, or use another --data.source"
            ) from error


def _unpack_package(dataset_class: Any, folder: Path) -> bool:
    """Put the files of the system's package where torchvision looks for them; whether there is one, undamaged."""
    if (package := _PACKAGED.get(dataset_class.__name__)) is None:
        return False
    try:  # gzip's own checksum counts: Debian has packed the same bytes anew, so torchvision's does not fit
        files = {name: gzip.decompress((package / name).read_bytes()) for name, _ in dataset_class.resources}
    except (OSError, EOFError, zlib.error):
        return False
    for name, content in files.items():
        replace_file(folder / name.removesuffix(".gz"), content)
    return True


def _torchvision_folder(dataset_class: Any, root: Path) -> Path:
    if isinstance(folder := getattr(dataset_class, "base_folder", None), str):
        return root / folder
    return root / dataset_class.__name__ / "raw" if hasattr(dataset_class, "raw_folder") else root


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(path))
        except OSError as error:  # a folder that nobody here can write to needs no lock
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(f"--data.root={path.parent} cannot be used ({error}): set --data.root") from error
        yield
