"""Images without labels: one file, or all files below a folder, whatever their names."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lockstep.data.decoding import SKIP, decode, read_image
from lockstep.data.sources.source import Split, open_encoded
from lockstep.errors import UserError, first_line
from lockstep.files import path_of


@dataclass(frozen=True, eq=False)
class LooseImage:
    """A file, and its pixels as a network sees them, uint8 (H, W, C), or what is wrong with it."""

    name: str
    """Below the folder that was given"""
    pixels: np.ndarray | None
    problem: str = ""


def find_files(path: Path) -> list[Path]:
    """The file, or all files below the folder but hidden ones, in the order of their names.

    Raises UserError if there is nothing.
    """
    path = path_of(path)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"--images={path}: there is no such file or folder")
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if not file.is_dir() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise UserError(f"--images={path}: the folder holds no files")
    return found


def load_files(
    path: Path, shape: tuple[int, int, int], resize_size: int | None, size: int
) -> Iterator[list[LooseImage]]:
    """The images of `find_files` in batches of `size`, each as evaluation sees it: (C, H, W) is its `shape`.

    Where the network's images came in one size (`resize_size` None), others are brought to it.
    """
    files = find_files(path)
    root = path_of(path) if path_of(path).is_dir() else files[0].parent
    split = Split("images", np.zeros(len(files), np.int64), lambda row: _open(files[row]), lambda row: str(files[row]))

    def load(row: int) -> LooseImage:
        name = str(files[row].relative_to(root))
        try:
            return LooseImage(name, _pixels(split, row, shape, resize_size))
        except (ValueError, OSError, MemoryError) as error:
            return LooseImage(name, None, first_line(error).removesuffix(f", or {SKIP}"))

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), size):
            yield list(pool.map(load, range(start, min(start + size, len(files)))))


def _open(path: Path) -> Image.Image:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError("it is not a file")
    return open_encoded(str(path))


def _pixels(split: Split, row: int, shape: tuple[int, int, int], resize_size: int | None) -> np.ndarray:
    channels, height, width = shape
    image = read_image(split, row, channels)
    if resize_size is None and image.size != (width, height):
        resize_size = max(height, width)
    return decode(image, (height, width, channels), resize_size)
