"""What eval.py prints and writes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lockstep.data.images import Data
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.scores import scores
from lockstep.report.drawing import Drawing
from lockstep.report.evaluation import Evaluated, report_evaluation
from lockstep.settings.config import Config, LogConfig


def assert_picture(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.size[1] == 1020 and np.asarray(picture.convert("L")).std() > 5, f"{path} is empty"


CONFIG = Config(log=LogConfig(wandb="disabled"))


@pytest.fixture(autouse=True)
def without_other_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own, in test_run_figures.py and test_suspicious.py."""
    for name in ("_confusion", "_rankings"):
        monkeypatch.setattr(f"lockstep.report.run_figures.{name}", lambda *_: None)
    monkeypatch.setattr("lockstep.report.suspicious.plot_samples", lambda *_: None)


def test_every_number_is_printed_and_written(
    tmp_path: Path, evaluated: tuple[Data, Predictions], capsys: pytest.CaptureFixture[str]
) -> None:
    data, rows = evaluated
    done = Evaluated(CONFIG, tmp_path, tmp_path / "step_00000003", "test", data.test, data, rows, (1.25, "as given"))
    report_evaluation(done, "fp32, 1 process")
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "metrics_test.json").read_text())
    assert written["metrics"] == {**rows.headline(), **scores(rows)}
    assert (written["samples"], written["how"]) == (359, "fp32, 1 process")
    assert written["data"] == "embedded:digits" and "test split of embedded:digits: 359 samples" in printed
    assert [row["class"] for row in written["classes"]] == [str(number) for number in range(12)]
    assert sum(row["support"] for row in written["classes"]) == 359
    assert written["means"]["macro"]["recall"] == pytest.approx(np.mean([row["recall"] for row in written["classes"]]))
    assert written["temperature"] == {"value": 1.25, "from": "as given"}
    for name in ("loss", "calibration_error", "brier"):
        before, after = written["metrics"][name], written["calibrated"][name]
        assert before != after and f"{name.replace('_', ' ')} {before:.4f} -> {after:.4f}" in printed
    for name in ("top5 accuracy", "balanced accuracy", "roc auc", "mean average precision"):
        assert f"{name} {written['metrics'][name.replace(' ', '_')]:.4f}" in printed
    assert f"accuracy {rows.accuracy!r} " in printed and f"loss {rows.loss!r}\n" in printed
    assert_picture(tmp_path / "figures" / "reliability.png")


def test_what_needs_all_probabilities_says_so_without_them(
    tmp_path: Path, evaluated: tuple[Data, Predictions], capsys: pytest.CaptureFixture[str]
) -> None:
    data, rows = evaluated
    done = Evaluated(CONFIG, tmp_path, tmp_path, "val", data.test, data, replace(rows, probabilities=None))
    report_evaluation(done, "fp32, 1 process")
    assert "not computed: brier, roc auc, mean average precision, for the prob" in capsys.readouterr().out
    written = json.loads((tmp_path / "metrics_val.json").read_text())
    assert written["metrics"]["roc_auc"] is None and "calibrated" not in written
    assert_picture(tmp_path / "figures" / "reliability_val.png")


def test_a_network_of_nan_is_reported_as_one(
    tmp_path: Path, evaluated: tuple[Data, Predictions], capsys: pytest.CaptureFixture[str]
) -> None:
    data, rows = evaluated
    nothing = {name: np.full_like(getattr(rows, name), np.nan) for name in ("losses", "confidences", "probabilities")}
    report_evaluation(Evaluated(CONFIG, tmp_path, tmp_path, "test", data.test, data, replace(rows, **nothing)), "fp32")
    assert "calibration error nan" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics_test.json").read_text())["metrics"]["roc_auc"] == "NaN"


def test_every_picture_is_named_and_none_costs_a_result(
    tmp_path: Path,
    evaluated: tuple[Data, Predictions],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, rows = evaluated
    plots = {"first": Path.touch, "bad": lambda path: path.read_bytes(), "last": Path.touch}
    drawings = [Drawing(tmp_path / f"{title}.png", plot, title) for title, plot in plots.items()]
    monkeypatch.setattr("lockstep.report.evaluation.drawings_of_split", lambda *_: drawings)
    monkeypatch.setattr("lockstep.report.drawing.allowed_cores", lambda: 2)
    done = Evaluated(CONFIG, tmp_path, None, "val", data.test, data, rows)
    with pytest.raises(FileNotFoundError, match="bad.png"):
        report_evaluation(done, "fp32, 1 process")
    *_, suspicious, first, last = capsys.readouterr().out.splitlines()
    assert suspicious.startswith("labels that look wrong: ")
    assert (first, last) == (f"first: {tmp_path / 'first.png'}", f"last: {tmp_path / 'last.png'}")
    assert all((tmp_path / name).is_file() for name in ("first.png", "last.png", "predictions_val.parquet"))
