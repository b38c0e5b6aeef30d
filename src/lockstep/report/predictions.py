"""What a network predicted: a table per class, a file with a row per sample, and the images behind the rows."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.data.images import Data, ImageSet
from lockstep.errors import UserError, first_line
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.scores import mean_scores
from lockstep.files import require_plain_file, written_aside


def class_names(data: Data) -> list[str]:
    """Names of all outputs of the network, also of those that the data set does not show."""
    return [*data.classes, *(str(i) for i in range(len(data.classes), data.num_classes))]


def pixels(images: ImageSet, indices: np.ndarray) -> np.ndarray:
    """Images as the network sees them before augmentation, uint8 (N, H, W, C); black where one was skipped."""
    channels, height, width = images.shape
    blank = np.zeros((height, width, channels), np.uint8)
    loaded = (images.load(int(index)) for index in indices)
    return np.stack([blank if image is None else image.numpy() for image in loaded])


def worst_mistakes(predictions: Predictions, most: int) -> np.ndarray:
    """Rows of the wrong predictions with the highest losses, worst first, int64 (at most `most`,)."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    return wrong[np.argsort(-predictions.losses[wrong], kind="stable")][:most]


def class_table(predictions: Predictions, data: Data) -> str:
    """Precision, recall, F1 and number of samples of every class, and their means over classes, as text."""
    names = class_names(data)
    width = max(len("weighted mean"), *map(len, names))
    scores = predictions.per_class()
    lines = [f"{'class':<{width}}  precision  recall      f1  samples"]
    for name, precision, recall, f1, support in zip(names, *scores.values(), strict=True):
        lines.append(f"{name:<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7d}")
    for name, means in mean_scores(predictions).items():
        precision, recall, f1 = means.values()
        row = f"{precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {len(predictions.samples):7d}"
        lines.append(f"{f'{name} mean':<{width}}  {row}")
    return "\n".join(lines)


def write_predictions(folder: Path, split: str, predictions: Predictions, images: ImageSet, data: Data) -> Path:
    """One row per sample, `predictions_<split>.parquet`; returns the file's path.

    Columns: sample (row in the source's split), image (its file, or how messages name it), label, prediction,
    confidence, loss, and, where they were kept, probabilities (a list in the order of the classes, which the file's
    metadata name, beside the digest of the data's content).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, rows = np.array(class_names(data)), images.rows[predictions.samples].numpy()
    columns = {
        "sample": rows,
        "image": [images.split.where(int(row)).encode(errors="replace").decode() for row in rows],
        "label": names[predictions.labels],
        "prediction": names[predictions.predicted],
        "confidence": predictions.confidences,
        "loss": predictions.losses,
    }
    if predictions.probabilities is not None:
        flat = pa.array(predictions.probabilities.ravel())
        columns["probabilities"] = pa.FixedSizeListArray.from_arrays(flat, predictions.num_classes)
    described = {"classes": json.dumps(names.tolist()), "data": str(data.identity["content"])}
    table = pa.table(columns).replace_schema_metadata(described)
    path = folder / f"predictions_{split}.parquet"
    with written_aside(path) as file:
        pq.write_table(table, file)
    return path


@dataclass(frozen=True, eq=False)
class Judged:
    """What a file of predictions says of each sample, in the samples' order, and the digest of the data."""

    samples: np.ndarray
    labels: np.ndarray
    """Names of classes"""
    right: np.ndarray
    data: str


def read_predictions(folder: Path, split: str) -> Judged:
    """The samples of `predictions_<split>.parquet`; raises UserError if it is not there, or no such file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"predictions_{split}.parquet"
    if not path.exists():
        raise UserError(f"there is no {path}: eval.py --run {folder} --split {split} writes it")
    require_plain_file(path)
    try:
        table = pq.read_table(path, columns=["sample", "label", "prediction"])
        samples, labels, predicted = (table[name].to_numpy() for name in ("sample", "label", "prediction"))
    except (pa.ArrowException, OSError, KeyError) as damage:
        raise UserError(f"{path} is damaged ({first_line(damage)}): eval.py writes it anew") from damage
    order = np.argsort(samples, kind="stable")
    digest = (table.schema.metadata or {}).get(b"data", b"").decode()
    return Judged(samples[order], labels[order], (labels == predicted)[order], digest)


def require_same_samples(first: Judged, second: Judged) -> None:
    """Raise UserError, with what differs, unless two files of predictions are of the same samples."""
    cause = ""
    if first.data and second.data and first.data != second.data:
        cause = f"data of content {first.data} and {second.data}"
    elif not np.array_equal(first.samples, second.samples):
        common = len(np.intersect1d(first.samples, second.samples))
        cause = f"{len(first.samples)} and {len(second.samples)} samples, {common} of them in both"
    elif not np.array_equal(first.labels, second.labels):
        place = int(np.flatnonzero(first.labels != second.labels)[0])
        cause = f"sample {first.samples[place]} is {first.labels[place]} in one, {second.labels[place]} in the other"
    if cause:
        raise UserError(f"these are predictions of different samples ({cause}): evaluate both on the same data")
