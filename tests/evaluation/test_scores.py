"""Scores against scikit-learn, and of seven samples by hand, at any number of processes."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn

from lockstep.augment.transform import Transform
from lockstep.evaluation.evaluate import evaluate
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.scores import SCORES, mean_scores, scores
from lockstep.settings.config import AugmentConfig


def rows_of(probabilities: np.ndarray, labels: np.ndarray) -> Predictions:
    true = probabilities[np.arange(len(labels)), labels][:, None]
    return Predictions(
        np.arange(len(labels)),
        labels,
        probabilities.argmax(1),
        probabilities.max(1).astype(float),
        -np.log(true[:, 0].astype(float)),
        (probabilities > true).sum(1),
        probabilities.shape[1],
        probabilities=probabilities.astype(np.float32),
    )


def drawn(count: int = 300, classes: int = 9, unseen: int = 0) -> Predictions:
    random = np.random.default_rng(5)
    labels = random.integers(0, classes - unseen, count)
    logits = random.normal(size=(count, classes)) + 2 * np.eye(classes)[labels] * random.random((count, 1))
    exact = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return rows_of(exact.astype(np.float32), labels)


def test_scores_are_scikit_learns() -> None:
    rows = drawn()
    got, labels, probabilities = scores(rows), rows.labels, rows.probabilities.astype(float)
    one_hot = np.eye(9)[labels]
    probabilities /= probabilities.sum(1, keepdims=True)  # which scikit-learn asks for, to 1e-8
    exact = {
        "balanced_accuracy": sk.balanced_accuracy_score(labels, rows.predicted),
        "roc_auc": sk.roc_auc_score(one_hot, rows.probabilities, average="macro"),
        "mean_average_precision": sk.average_precision_score(one_hot, rows.probabilities, average="macro"),
    }
    for name, value in exact.items():
        assert got[name] == pytest.approx(value, abs=1e-12), name
    # Probabilities in float32 do not add up to 1 but for their last bits.
    assert got["brier"] == pytest.approx(((rows.probabilities.astype(float) - one_hot) ** 2).sum(1).mean(), abs=1e-6)
    assert got["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, probabilities, multi_class="ovr"), abs=1e-6)


def test_means_over_classes_are_scikit_learns() -> None:
    rows = drawn()
    for average, means in mean_scores(rows).items():
        expected = sk.precision_recall_fscore_support(rows.labels, rows.predicted, average=average, zero_division=0)
        assert list(means.values()) == pytest.approx(expected[:3], abs=1e-12), average


def test_classes_without_samples_do_not_count_where_they_cannot() -> None:
    rows = drawn(unseen=2)
    present = list(range(7))
    got = scores(rows)
    recall = sk.recall_score(rows.labels, rows.predicted, labels=present, average="macro")
    assert got["balanced_accuracy"] == pytest.approx(recall, abs=1e-12)
    areas = [sk.roc_auc_score(rows.labels == number, rows.probabilities[:, number]) for number in present]
    assert got["roc_auc"] == pytest.approx(np.mean(areas), abs=1e-12)


def test_without_probabilities_the_scores_that_need_them_are_missing() -> None:
    rows = drawn()
    few = Predictions(*(getattr(rows, name) for name in list(vars(rows))[:7]))
    got = scores(few)
    assert {name for name, value in got.items() if value is None} == {"brier", "roc_auc", "mean_average_precision"}
    assert {name: value for name, value in scores(rows).items() if got[name] is not None} == {
        name: value for name, value in got.items() if value is not None
    }


def test_a_network_of_nan_has_no_areas() -> None:
    rows = drawn()
    rows.probabilities[3] = np.nan
    assert np.isnan(scores(rows)["roc_auc"]) and np.isnan(scores(rows)["mean_average_precision"])


# ---- seven samples, on one process and on several -------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2])
PROBABILITIES = torch.tensor(
    [
        [0.8, 0.1, 0.1],
        [0.6, 0.3, 0.1],
        [0.2, 0.7, 0.1],  # taken for 1
        [0.1, 0.8, 0.1],
        [0.5, 0.4, 0.1],  # taken for 0
        [0.1, 0.1, 0.8],
        [0.25, 0.15, 0.6],
    ],
    dtype=torch.float64,
)


class Recited(nn.Module):
    """Puts out the logits that the one pixel of each image is the number of."""

    def forward(self, images: Tensor) -> Tensor:
        return PROBABILITIES.log()[(images.flatten(1)[:, 0] * 255).round().long()]


class Dealt:
    """A process's share of batches of two, the last of one."""

    data, num_classes = LABELS, 3

    def __init__(self, index: int, processes: int) -> None:
        self.batches = torch.arange(7).split(2)[index::processes]

    def __iter__(self) -> Any:
        for samples in self.batches:
            yield samples, samples.to(torch.uint8).view(-1, 1, 1, 1), LABELS[samples]


class Together:
    """Processes as threads, whose sums wait for each other."""

    device = torch.device("cpu")

    def __init__(self, processes: int) -> None:
        self.num_processes = processes
        self._parts: list[Tensor] = []
        self._barrier = threading.Barrier(processes)

    def reduce(self, part: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self._barrier.wait()
        self._parts.append(part)
        self._barrier.wait()
        total = torch.stack(self._parts).sum(0)
        if self._barrier.wait() == 0:
            self._parts.clear()
        self._barrier.wait()
        return total


def seven(processes: int) -> list[Predictions]:
    plain, accelerator = Transform(AugmentConfig(), (0.0,), (1.0,), torch.float64), Together(processes)
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        loader: Any = Dealt(index, processes)
        found[index] = evaluate(Recited(), loader, plain, accelerator, with_probabilities=True)  # type: ignore[arg-type]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[index] for index in range(processes)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_seven_samples_by_hand(processes: int) -> None:
    for rows in seven(processes):
        got = scores(rows)
        assert rows.accuracy == pytest.approx(5 / 7, abs=1e-12)
        assert got["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3, abs=1e-12)
        squares = [0.06, 0.26, 1.14, 0.06, 0.62, 0.06, 0.245]
        assert got["brier"] == pytest.approx(sum(squares) / 7, abs=1e-6)
        # Pairs of a class's sample and another one: of 12, 2 are out of order (0.2 < 0.5 and 0.25); of 10, one; none.
        assert got["roc_auc"] == pytest.approx((10 / 12 + 9 / 10 + 1) / 3, abs=1e-12)
        # Ranks of the hits: 1, 2, 5; 1, 3; 1, 2.
        precision = [(1 + 1 + 3 / 5) / 3, (1 + 2 / 3) / 2, 1]
        assert got["mean_average_precision"] == pytest.approx(sum(precision) / 3, abs=1e-12)
        # Bins of 1/15: 0.5 (wrong), 0.6 twice (right), 0.7 (wrong), 0.8 three times (right).
        assert got["calibration_error"] == pytest.approx((0.5 + 2 * 0.4 + 0.7 + 3 * 0.2) / 7, abs=1e-7)
        assert mean_scores(rows)["weighted"]["precision"] == pytest.approx((3 * 2 / 3 + 2 / 2 + 2) / 7, abs=1e-12)


def test_the_number_of_processes_leaves_no_trace() -> None:
    every = [scores(rows) for processes in (1, 2, 3) for rows in seven(processes)]
    assert len(every) == 6 and all(found == every[0] for found in every) and every[0].keys() == SCORES.keys()
