"""What a finished run leaves: tables, predictions, pictures, summary."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stretch import prepared

from lockstep.data.crop import CROP_VERSION
from lockstep.data.images import Data
from lockstep.evaluation.metrics import Predictions
from lockstep.launch import guards
from lockstep.launch.accelerator import Launch
from lockstep.launch.numerics import numerics_of
from lockstep.report import drawing
from lockstep.report import summary as summary_module
from lockstep.report.summary import changed_numerics, report_training
from lockstep.run.folder import Run
from lockstep.run.tracker import build_tracker
from lockstep.settings.config import Config, DataConfig, LogConfig, RunConfig
from lockstep.training.calendar import build_calendar
from lockstep.training.progress import Progress, Validation


def config_of(folder: Path, **log: Any) -> Config:
    quiet: dict[str, Any] = {"wandb": "disabled", "tensorboard": False, **log}
    data = DataConfig(cache_dir=str(folder / "cache"), num_classes=12)
    return Config(run=RunConfig(name="run", root=str(folder)), data=data, log=LogConfig(**quiet))


def perfect(data: Data) -> Predictions:
    labels = data.test.labels.numpy()
    ones, zeros = np.ones(len(labels)), np.zeros(len(labels))
    return Predictions(np.arange(len(labels)), labels, labels, ones, zeros, zeros, 12)


def run_in(folder: Path, **log: Any) -> Run:
    run = Run(folder / "run", config_of(folder, **log), {})
    run.create(micro_batch_size=64, threads=1)
    return run


@pytest.mark.parametrize("figures", [True, False])
def test_a_finished_training_leaves_its_summary(
    tmp_path: Path, figures: bool, evaluated: tuple[Data, Predictions], capsys: pytest.CaptureFixture[str]
) -> None:
    data, metrics = evaluated
    run = run_in(tmp_path, figures=figures)
    run.write_summary(state="running", of_before=7)
    progress = Progress(step=50, validations=[Validation(3, 0.5)], best_step=40, best_accuracy=0.9)
    progress.train_seconds, progress.restarts = 10.0, 1
    tracker = build_tracker(run.config, run.path, is_main=True)
    report_training(run, tracker, progress, build_calendar(run.config, 20, has_validation=True), metrics, data)
    summary = json.loads((run.path / "summary.json").read_text())
    expected = {
        "state": "finished", "of_before": 7, "test_accuracy": metrics.accuracy, "test_loss": metrics.loss,
        "best_val_accuracy": 0.9, "best_step": 40, "steps": 50, "epochs": 3, "images_per_second": 50 * 64 / 10,
        "train_seconds": 10.0, "restarts": 1,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert (run.path / "figures").exists() == figures
    printed = capsys.readouterr()
    line = (printed.out + printed.err).strip().splitlines()[-1]
    assert f"test accuracy {metrics.accuracy:.2%}" in line and "(best: step 40), 320 images/s" in line
    assert str(run.path) in line


@pytest.mark.parametrize("cores", [1, 2])
def test_pictures_do_not_need_the_charts(
    cores: int, tmp_path: Path, evaluated: tuple[Data, Predictions], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """An error of an exhibit leaves no picture out, neither in the run folder nor in its copies."""
    monkeypatch.setattr(drawing, "allowed_cores", lambda: cores)
    monkeypatch.setattr(summary_module, "show_results", lambda *_: int("no number"))
    data, metrics = evaluated
    run = run_in(tmp_path)
    tracker = build_tracker(run.config, run.path, is_main=True)
    shown: list[str] = []
    monkeypatch.setattr(tracker, "figure", lambda name, path: shown.append(path.name))
    report_training(run, tracker, Progress(step=50), build_calendar(run.config, 20, has_validation=True), metrics, data)
    assert len(shown) == 5 and all((run.path / "figures" / name).is_file() for name in shown)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"the charts of {run.path} could not be shared"
    ]


def test_another_rule_of_streamed_crops_is_a_change_of_numerics(tmp_path: Path) -> None:
    """Of runs that have such crops; the others have no word of it."""
    runtime, launch = Config().runtime, Launch(torch.device("cpu"), 1, 0, 0, "no", 1)
    rule = {"crops": CROP_VERSION}

    def change(before: dict[str, int], now: dict[str, int] | None) -> str:
        (tmp_path / "environment.json").write_text(json.dumps([{"numerics": numerics_of(runtime, launch) | before}]))
        return changed_numerics(tmp_path, runtime, launch, now)

    assert change({}, rule) == f"crops None -> {CROP_VERSION}"
    assert change({"crops": 1}, None) == f"crops 1 -> {CROP_VERSION}"  # of a finished run, whose data are not opened
    assert change(rule, rule) == change(rule, None) == change({}, {}) == change({}, None) == ""


@pytest.mark.parametrize("fast", [True, False])
def test_a_start_says_once_that_another_precision_is_quicker(
    fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guards, "has_fast_bf16", lambda on_cpu: fast)
    with prepared("--model.name=tiny_cnn"):
        printed = capsys.readouterr().out.splitlines()
    assert printed.count("note: this device has fast bf16: --runtime.precision=auto takes it") == fast
