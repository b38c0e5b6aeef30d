"""Predictions: names of classes, a table per class, a row per sample."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from lockstep.data.images import Data
from lockstep.evaluation.metrics import Predictions
from lockstep.report.predictions import class_names, class_table, write_predictions


def test_class_names_cover_all_outputs_of_the_network(evaluated: tuple[Data, Predictions]) -> None:
    assert class_names(evaluated[0]) == [str(i) for i in range(12)]


def test_the_class_table_is_scikit_learns(evaluated: tuple[Data, Predictions]) -> None:
    data, metrics = evaluated
    every = list(range(12))
    scores = precision_recall_fscore_support(metrics.labels, metrics.predicted, labels=every, zero_division=0)
    head, *rows, mean, weighted = class_table(metrics, data).splitlines()
    assert head.split() == ["class", "precision", "recall", "f1", "samples"]
    assert len({len(line) for line in (head, *rows, mean, weighted)}) == 1, "columns are not aligned"
    for row, name, *expected in zip(rows, class_names(data), *scores, strict=True):
        assert row.split()[0] == name
        np.testing.assert_allclose([float(part) for part in row.split()[1:]], expected, atol=5.1e-5)
    assert mean.startswith("macro mean")
    wanted = [column.mean() for column in scores[:3]] + [359]
    np.testing.assert_allclose([float(part) for part in mean.split()[2:]], wanted, atol=5.1e-5)
    assert weighted.startswith("weighted mean")
    wanted = [np.average(column, weights=scores[3]) for column in scores[:3]] + [359]
    np.testing.assert_allclose([float(part) for part in weighted.split()[2:]], wanted, atol=5.1e-5)


def test_predictions_are_one_row_per_sample(tmp_path: Path, evaluated: tuple[Data, Predictions]) -> None:
    data, metrics = evaluated
    kept = np.arange(len(metrics.samples)) % 7 > 0  # as if every seventh image had been skipped
    columns = ("samples", "labels", "predicted", "confidences", "losses", "better", "probabilities")
    some = replace(metrics, **{name: getattr(metrics, name)[kept] for name in columns})
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    images = data.test.subset(order)  # sample i is row order[i] of the source
    path = write_predictions(tmp_path, "test", some, images, data)
    assert path == tmp_path / "predictions_test.parquet"
    table = pq.read_table(path).to_pydict()
    assert list(table) == ["sample", "image", "label", "prediction", "confidence", "loss", "probabilities"]
    assert table["image"] == [images.split.where(row) for row in table["sample"]] and "row" in table["image"][0]
    assert some.probabilities is not None and table["probabilities"] == some.probabilities.tolist()
    assert [max(row) for row in table["probabilities"]] == pytest.approx(table["confidence"])
    assert json.loads(pq.read_schema(path).metadata[b"classes"]) == class_names(data)
    assert table["sample"] == order[torch.from_numpy(kept)].tolist()
    assert table["label"] == [str(label) for label in some.labels]
    assert table["prediction"] == [str(prediction) for prediction in some.predicted]
    assert table["confidence"] == some.confidences.tolist() and table["loss"] == some.losses.tolist()
