"""What W&B is given of a finished training, as W&B's own reader finds it in the offline run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logs import wandb_points, wandb_records, wandb_summary
from programs import QUICK
from sklearn.metrics import average_precision_score
from torch import nn

from lockstep.data.images import Data
from lockstep.evaluation.metrics import Predictions
from lockstep.report import exhibits
from lockstep.report.exhibits import (
    layer_table,
    mistake_gallery,
    prediction_table,
    results,
    sample_gallery,
    share_files,
    show_results,
)
from lockstep.report.predictions import class_names
from lockstep.run.exhibit import Artifact, Exhibit, Scores
from lockstep.run.folder import Run
from lockstep.run.tracker import Tracker
from lockstep.settings.config import Config

Evaluated = tuple[Data, Predictions]


class Sharing(Tracker):
    """A tracker that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, Exhibit]] = []

    def exhibit(self, name: str, build: Any) -> None:
        if (item := build()) is not None:
            self.shown.append((name, item))


def test_the_prediction_table_has_the_worst_rows(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    data, predictions = evaluated
    monkeypatch.setattr(exhibits, "_MOST_ROWS", 7)
    table = prediction_table(predictions, data.test, class_names(data))
    assert table.columns == ("sample", "label", "prediction", "confidence", "loss") and len(table.rows) == 7
    losses = [row[-1] for row in table.rows]
    assert losses == sorted(predictions.losses.tolist(), reverse=True)[:7]
    worst = int(predictions.losses.argmax())
    assert table.rows[0][:3] == (
        int(data.test.rows[worst]),
        str(predictions.labels[worst]),
        str(predictions.predicted[worst]),
    )


def test_galleries_show_images_with_captions(evaluated: Evaluated) -> None:
    data, predictions = evaluated
    samples = sample_gallery(data)
    assert samples.images.shape == (25, 8, 8, 1)
    assert samples.captions == [str(label) for label in data.train.labels[:25].tolist()]
    mistakes = mistake_gallery(predictions, data.test, class_names(data))
    wrong = np.where(predictions.predicted != predictions.labels, predictions.losses, -1)
    worst = int(wrong.argmax())
    expected = f"{predictions.labels[worst]}, taken for {predictions.predicted[worst]} (loss {wrong[worst]:.2f})"
    assert mistakes.captions[0] == expected
    assert data.test.images is not None
    assert (mistakes.images[0] == data.test.images.take(data.test.rows[[worst]])[0].numpy()).all()


def test_layers_are_rows() -> None:
    assert layer_table(nn.Sequential(nn.Linear(3, 2), nn.ReLU())).rows == [
        ("0", "Linear", "2x3", 8),
        ("1", "ReLU", "", 0),
    ]


def test_curves_are_of_the_classes_that_rank_worst(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    data, predictions = evaluated
    monkeypatch.setattr(exhibits, "_MOST_CURVES", 3)
    scores = results(predictions, data.test, data)["pr_curves"]()
    assert isinstance(scores, Scores) and len(scores.shown) == 3
    precision = {
        number: average_precision_score(predictions.labels == number, scores.probabilities[:, number])
        for number in range(10)  # classes 10 and 11 have no sample
    }
    assert list(scores.shown) == sorted(precision, key=lambda number: precision[number])[:3]
    assert list(scores.shown.values()) == [str(number) for number in scores.shown]


def test_without_probabilities_and_mistakes_there_is_less_to_show(evaluated: Evaluated) -> None:
    data, predictions = evaluated
    tracker = Sharing()
    show_results(tracker, Config(), replace(predictions, predicted=predictions.labels, probabilities=None), data)
    assert [name for name, _ in tracker.shown] == ["confusion", "predictions", "sample_gallery"]


@pytest.mark.parametrize("same", [True, False])
def test_shared_files_are_the_best_and_the_last_weights(same: bool, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (10, 20):
        (checkpoints / f"step_{step:08}").mkdir(parents=True)
        for file in ("model.safetensors", "optimizer.pt", "config.yaml"):
            (checkpoints / f"step_{step:08}" / file).touch()
    (checkpoints / "last").symlink_to("step_00000020")
    (checkpoints / "best").symlink_to("step_00000020" if same else "step_00000010")
    (tmp_path / "split.json").touch()
    tracker = Sharing()
    share_files(Run(tmp_path, Config(), {}), tracker)
    *models, (name, split) = tracker.shown
    assert (name, split) == ("split", Artifact("dataset", [tmp_path / "split.json"], []))
    found = [(item.aliases, [path.name for path in item.files], item.files[0].parent.name) for _, item in models]
    files = ["model.safetensors", "config.yaml"]
    if same:
        assert found == [(["last", "best"], files, "step_00000020")]
    else:
        assert found == [(["last"], files, "step_00000020"), (["best"], files, "step_00000010")]


@pytest.mark.slow
def test_a_training_shows_all_of_it_to_wandb(wandb_home: Path, train_here: Any) -> None:
    settings = [setting for setting in QUICK if setting not in ("--log.wandb=disabled", "--log.figures=false")]
    run = train_here(*settings, "--log.wandb=offline", "--log.artifacts=true", "--run.name=shown")
    records = wandb_records(next((run / "wandb").glob("offline-run-*")))
    named = {key.split(".")[0] for point in wandb_points(records) for key in point}
    assert {
        "confusion_table",
        "pr_curves_table",
        "roc_curves_table",
        "predictions",
        "sample_gallery",
        "mistake_gallery",
        "layers",
        "curves",
    } <= named
    summary = wandb_summary(records)
    assert summary["predictions.nrows"] == 359 and summary["sample_gallery.count"] == 25
    assert summary["best_val_accuracy"] == json.loads((run / "summary.json").read_text())["best_val_accuracy"]
    made = next(record["run"] for record in records if record["type"] == "run")
    assert made["job_type"] == "train" and len(made["config"]["update"]["environment"]["git_commit"]) == 40
    kept = [record["artifact"] for record in records if record["type"] == "artifact"]
    models = [artifact for artifact in kept if artifact["name"] == f"model-{made['run_id']}"]
    assert {alias for model in models for alias in model["aliases"]} >= {"best", "last"}
    stored = {entry["path"] for model in models for entry in model["manifest"]["contents"]}
    assert stored == {"model.safetensors", "config.yaml"}
    assert not any(record["type"] == "alert" for record in records)  # offline
