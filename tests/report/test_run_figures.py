"""The pictures of a run folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lockstep.data.images import Data
from lockstep.evaluation.metrics import Predictions
from lockstep.report.run_figures import drawings_of, drawings_of_split
from lockstep.run.folder import Run
from lockstep.settings.config import AugmentConfig, Config, RunConfig


def assert_picture(path: Path) -> None:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 300 and pixels.std() > 5, f"{path} is empty"


def draw_figures(run: Run, predictions: Predictions, data: Data) -> dict[str, Path]:
    return {drawing.path.stem: drawing.draw() for drawing in drawings_of(run, predictions, data)}


def test_figures_are_drawn(tmp_path: Path, evaluated: tuple[Data, Predictions]) -> None:
    data, metrics = evaluated
    run = Run(tmp_path / "run", Config(), {})
    paths = draw_figures(run, metrics, data)
    assert list(paths) == ["curves", "confusion_matrix", "samples", "pr_roc", "mistakes"]
    assert {path.name for path in (run.path / "figures").iterdir()} == {f"{name}.png" for name in paths}
    for path in paths.values():
        assert_picture(path)


def test_figures_of_a_split_are_drawn(tmp_path: Path, evaluated: tuple[Data, Predictions]) -> None:
    data, metrics = evaluated
    drawings = drawings_of_split(tmp_path, "val", metrics, data, {"As trained": metrics})
    assert [shown.title for shown in drawings] == ["confusion matrix", "precision, recall and ROC", "calibration"]
    names = ("confusion_matrix_val.png", "pr_roc_val.png", "reliability_val.png")
    for name, drawing in zip(names, drawings, strict=True):
        assert drawing.draw() == tmp_path / "figures" / name
        assert_picture(drawing.path)
    unknown = replace(metrics, probabilities=None)
    titles = [shown.title for shown in drawings_of_split(tmp_path, "test", unknown, data, {})]
    assert titles == ["confusion matrix", "calibration"]


def test_augmentation_is_drawn_where_there_is_any(tmp_path: Path, evaluated: tuple[Data, Predictions]) -> None:
    data, metrics = evaluated
    config = Config(run=RunConfig(root=str(tmp_path), name="run"), augment=AugmentConfig(rotation=20))
    paths = draw_figures(Run(tmp_path / "run", config, {}), metrics, data)
    assert_picture(paths["augmentation"])


def test_without_mistakes_there_is_no_picture_of_them(tmp_path: Path, evaluated: tuple[Data, Predictions]) -> None:
    data, metrics = evaluated
    run = Run(tmp_path / "run", Config(), {})
    perfect = replace(metrics, predicted=metrics.labels, probabilities=None)
    assert list(draw_figures(run, perfect, data)) == ["curves", "confusion_matrix", "samples"]
    assert not (run.path / "figures" / "mistakes.png").exists()


def test_the_gallery_shows_the_worst_mistakes_first(
    tmp_path: Path, evaluated: tuple[Data, Predictions], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.report import run_figures as report

    data, metrics = evaluated
    assert data.test.images is not None and data.train.images is not None
    shown: dict[str, tuple[np.ndarray, list[str]]] = {}
    monkeypatch.setattr(
        report, "plot_samples", lambda images, titles, path: shown.update({path.stem: (images, list(titles))})
    )
    draw_figures(Run(tmp_path / "run", Config(), {}), metrics, data)
    images, titles = shown["mistakes"]
    wrong = metrics.predicted != metrics.labels
    worst = np.where(wrong, -metrics.losses, 0).argsort(kind="stable")[:25]
    assert titles == [f"{metrics.labels[i]},\ntaken for {metrics.predicted[i]}" for i in worst]
    for image, i in zip(images, worst, strict=True):
        assert np.array_equal(image, data.test.images.take(data.test.rows[[int(i)]])[0])
    images, titles = shown["samples"]
    assert titles == [str(label) for label in data.train.labels[:25].tolist()]
    assert np.array_equal(images, data.train.images.take(data.train.rows[:25]))
