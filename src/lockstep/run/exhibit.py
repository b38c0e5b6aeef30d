"""What a run shows beside its curves, to the copies that can show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Table:
    """Rows to sort and filter."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images with a caption each."""

    images: "np.ndarray"
    """uint8 (N, H, W, C), C = 1 or 3"""
    captions: Sequence[str]


@dataclass(frozen=True, eq=False)
class Confusion:
    """A confusion matrix, by the label and the prediction of each sample."""

    labels: "np.ndarray"
    predicted: "np.ndarray"
    classes: Sequence[str]


@dataclass(frozen=True, eq=False)
class Scores:
    """How probable some classes are for each sample: what precision-recall and ROC curves are drawn from."""

    labels: "np.ndarray"
    """int64 (N,)"""
    probabilities: "np.ndarray"
    """(N, classes)"""
    shown: dict[int, str]
    """Names of those to draw, by class number"""


@dataclass(frozen=True)
class Artifact:
    """Files that are kept in versions."""

    kind: str
    """model or dataset"""
    files: Sequence[Path]
    aliases: Sequence[str]
    """Names by which this version can be asked for"""


Exhibit = Table | Gallery | Confusion | Scores | Artifact
