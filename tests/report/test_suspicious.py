"""The table and the picture of labels that look wrong."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lockstep.data.images import Data
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.suspicious import suspicious_labels
from lockstep.report.suspicious import report_suspicious


def test_the_table_names_each_sample_and_what_the_network_says(
    tmp_path: Path, evaluated: tuple[Data, Predictions]
) -> None:
    data, rows = evaluated
    order = np.random.default_rng(0).permutation(len(data.test))
    told = report_suspicious(tmp_path, "val", rows, data.test.subset(order), data)
    found = suspicious_labels(rows)
    path, picture = tmp_path / "suspicious_labels_val.csv", tmp_path / "figures" / "suspicious_labels_val.png"
    assert len(found) and told == f"labels that look wrong: {len(found)} of 359: {path}, {picture}"
    assert Image.open(picture).convert("L").getextrema()[0] < 100
    table = list(csv.DictReader(path.open()))
    assert [int(row["sample"]) for row in table] == order[rows.samples[found]].tolist()
    assert table[0]["image"] == data.test.split.where(int(table[0]["sample"]))
    first = found[0]
    assert (table[0]["label"], table[0]["prediction"]) == (str(rows.labels[first]), str(rows.predicted[first]))
    assert float(table[0]["confidence"]) == pytest.approx(rows.confidences[first], abs=1e-6)
    assert float(table[0]["label_probability"]) == pytest.approx(np.exp(-rows.losses[first]), abs=1e-6)


def test_where_none_is_found_no_older_picture_stays(tmp_path: Path, evaluated: tuple[Data, Predictions]) -> None:
    data, rows = evaluated
    older = tmp_path / "figures" / "suspicious_labels.png"
    older.parent.mkdir()
    older.write_bytes(b"")
    told = report_suspicious(tmp_path, "test", replace(rows, predicted=rows.labels), data.test, data)
    assert told == "labels that look wrong: 0 of 359" and not older.exists()
    assert len((tmp_path / "suspicious_labels_test.csv").read_text().splitlines()) == 1
