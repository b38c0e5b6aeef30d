"""What a network makes of images without labels: a printed table, files with a row per image, and a gallery."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lockstep.data.loose import LooseImage
from lockstep.errors import UserError, print_line
from lockstep.files import replace_file, written_aside
from lockstep.report.figures import plot_samples

_GALLERY = 25
_MOST_PRINTED = 100
_PRINTED_CLASSES, _WRITTEN_CLASSES = 3, 5
_LONGEST_NAME, _LONGEST_TITLE = 50, 20


@dataclass(eq=False)
class LoosePredictions:
    """All images that could be read, with the probabilities of all classes, and a line for each other file."""

    classes: Sequence[str]
    names: list[str] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    """float32 (classes,) each"""
    shown: list[np.ndarray] = field(default_factory=list)
    """Pixels of the first 25"""
    problems: dict[str, str] = field(default_factory=dict)

    def add(self, images: Sequence[LooseImage], probabilities: np.ndarray) -> None:
        """Take in a batch: `probabilities` (n, classes) of those that have pixels, in their order."""
        read = [image for image in images if image.pixels is not None]
        self.names += [image.name for image in read]
        self.probabilities += list(probabilities)
        room = _GALLERY - len(self.shown)
        self.shown += [image.pixels for image in read[: max(room, 0)] if image.pixels is not None]
        self.problems |= {image.name: image.problem for image in images if image.pixels is None}

    def best(self, row: int, most: int) -> list[tuple[str, float]]:
        """The likeliest classes of an image, with their probabilities."""
        order = np.argsort(-self.probabilities[row], kind="stable")[:most]
        return [(self.classes[number], float(self.probabilities[row][number])) for number in order]


def report_images(folder: Path, found: LoosePredictions) -> None:
    """Print and write everything into `folder`; raises UserError, after all lines, if no file was an image."""
    for problem in found.problems.values():
        print_line(f"left out: {_plain(problem)}")
    if not found.names:
        raise UserError(f"--images: none of {len(found.problems)} files is an image that can be read")
    print_line(describe_images(found))
    print_line(f"predictions: {_write_table(folder, found)}, {_write_csv(folder, found)}")
    path = folder / "figures" / "images.png"
    titles = []
    for row, name in enumerate(found.names[: len(found.shown)]):
        ((best, share),) = found.best(row, 1)
        titles.append(f"{_short(_plain(name), _LONGEST_TITLE)}\n{best[:_LONGEST_TITLE]} {share:.1%}")
    plot_samples(np.stack(found.shown), titles, path)
    print_line(f"gallery: {path}")


def describe_images(found: LoosePredictions) -> str:
    """A line for each image, the first 100: its name, and its likeliest classes with their probabilities."""
    names = [_short(_plain(name), _LONGEST_NAME) for name in found.names[:_MOST_PRINTED]]
    width = max(map(len, names))
    lines = []
    for row, name in enumerate(names):
        shares = ", ".join(f"{best} {share:.2%}" for best, share in found.best(row, _PRINTED_CLASSES))
        lines.append(f"{name:<{width}}  {shares}")
    if len(found.names) > len(names):
        lines.append(f"and {len(found.names) - len(names)} more")
    return "\n".join(lines)


def _short(name: str, most: int) -> str:
    """The end of a path, which tells files apart."""
    return name if len(name) <= most else "..." + name[3 - most :]


def _plain(text: str) -> str:
    """Without line breaks, and bytes of no UTF-8, that a file's name may have."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _write_table(folder: Path, found: LoosePredictions) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    best = [found.best(row, 1)[0] for row in range(len(found.names))]
    flat = pa.array(np.concatenate(found.probabilities))
    columns = {
        "image": [name.encode(errors="replace").decode() for name in found.names],
        "prediction": [name for name, _ in best],
        "confidence": [share for _, share in best],
        "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(found.classes)),
    }
    table = pa.table(columns).replace_schema_metadata({"classes": json.dumps(list(found.classes))})
    path = folder / "predictions_images.parquet"
    with written_aside(path) as file:
        pq.write_table(table, file)
    return path


def _write_csv(folder: Path, found: LoosePredictions) -> Path:
    """A row per file: its name, the likeliest classes, their probabilities, and what is wrong with it."""
    most = min(_WRITTEN_CLASSES, len(found.classes))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", *(f"{of}_{n}" for n in range(1, most + 1) for of in ("class", "probability")), "problem"])
    for row, name in enumerate(found.names):
        table.writerow([name, *(part for pair in found.best(row, most) for part in pair), ""])
    for name, problem in found.problems.items():
        table.writerow([name, *[""] * (2 * most), problem])
    path = folder / "predictions_images.csv"
    replace_file(path, text.getvalue().encode(errors="replace"))
    return path
