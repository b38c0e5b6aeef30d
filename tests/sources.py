"""Data sets on disk for tests, in the forms that sources read."""

import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from lockstep.data.sources.kinds import Source, open_source
from lockstep.settings.config import DataConfig


def write_images(folder: Path, count: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new(mode, size, 10 * index).save(folder / f"{index}.png")


def image_folder(root: Path, splits: tuple[str, ...] = ("",), count: int = 5) -> str:
    for split in splits:
        for name in ("cat", "dog"):
            write_images(root / split / name, count)
    return f"folder:{root}"


def open_named(source: str, root: str | Path = "unused") -> Source:
    return open_source(DataConfig(source=source, root=str(root)))


def write_mnist(root: Path, count: int = 40) -> np.ndarray:
    """MNIST's own file format, as torchvision reads it."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels.tobytes())
    return pixels


def hub_folder(root: Path, rows: dict[str, list[tuple[bytes | None, int | None]]], label: str = "label") -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    for split, samples in rows.items():
        images = [{"bytes": content, "path": f"{index}.png"} for index, (content, _) in enumerate(samples)]
        table = pa.table({"image": images, label: [value for _, value in samples]})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return f"hf:{root}"


def write_shard(path: Path, files: Iterable[tuple[str, bytes | str]]) -> None:
    """An uncompressed tar file of these names and contents, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def tar_of_folder(images: Path, root: Path, splits: tuple[str, ...]) -> str:
    """The samples of an image folder in two shards a split, in the same order, and the names of its classes."""
    for split in splits:
        classes = sorted(path.name for path in (images / split).iterdir())
        files = [
            (f"{label:03d}_{path.name}", path.read_bytes(), f"{label:03d}_{path.stem}.cls", str(label))
            for label, name in enumerate(classes)
            for path in sorted((images / split / name).iterdir())
        ]
        for number, part in enumerate((files[: len(files) // 3], files[len(files) // 3 :])):
            pairs = [pair for image, content, cls, label in part for pair in ((image, content), (cls, label))]
            write_shard(root / f"{split or 'train'}-{number:06d}.tar", pairs)
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return f"tar:{root}"


def png(value: int) -> bytes:
    Image.new("L", (4, 4), value).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()
