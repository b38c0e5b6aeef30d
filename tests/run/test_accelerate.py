"""Trackers that Accelerate knows by name: they get the settings and every scalar, and may fail."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from logs import configured, train_record

from lockstep.errors import UserError
from lockstep.run.accelerate import require_trackers
from lockstep.run.history import read_history, scalars_of
from lockstep.run.tracker import build_tracker
from lockstep.settings.config import Config


class Ledger(GeneralTracker):
    """A tracker that keeps all in memory."""

    name, requires_logging_directory, tracker = "ledger", True, None
    calls: list[Any] = []

    def __init__(self, project: str, folder: str) -> None:
        super().__init__()
        self.calls[:] = [("project", project, folder)]

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("settings", values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if step == 3:
            raise ConnectionError("no route")
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "ledger", Ledger)
    return Ledger.calls


def log_two_steps(config: Config, run_dir: Path) -> list[dict[str, Any]]:
    tracker = build_tracker(config, run_dir, is_main=True)
    tracker.log(train_record(1, note="a text"))
    tracker.log({"step": 1, "epoch": 1, "split": "val", "accuracy": 0.5})
    tracker.log(train_record(2))
    tracker.finish({"state": "finished"})
    return [{"step": axes["step"], **values} for axes, values in map(scalars_of, read_history(run_dir))]


def test_a_tracker_gets_settings_and_scalars(ledger: list[Any], tmp_path: Path) -> None:
    expected = log_two_steps(configured(trackers=("ledger",)), tmp_path)
    assert ledger[0] == ("project", "lockstep", str(tmp_path))
    settings = ledger[1][1]
    assert settings["optim.lr"] == 1e-3 and settings["run.tags"] == "('a', 'b')"
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())
    assert [{"step": step, **values} for step, values in ledger[2:-1]] == expected and len(expected) == 3
    assert ledger[-1] == "finished"


def test_a_tracker_that_fails_is_dropped_with_one_warning(
    ledger: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = build_tracker(configured(trackers=("ledger",)), tmp_path, is_main=True)
    for step in (2, 3, 4):
        tracker.log(train_record(step))
    tracker.finish({})
    assert [call[0] for call in ledger] == ["project", "settings", 2]
    assert capsys.readouterr().out.count("warning: ledger stopped (no route); metrics.jsonl goes on without it") == 1
    assert [line["step"] for line in read_history(tmp_path)] == [2, 3, 4]


def test_a_tracker_that_cannot_start_is_one_warning(
    ledger: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ledger, "__init__", lambda self, project: None)
    assert len(log_two_steps(configured(trackers=("ledger",)), tmp_path)) == 3
    assert capsys.readouterr().out.startswith("warning: ledger is off (")


def test_only_the_main_process_has_trackers(ledger: list[Any], tmp_path: Path) -> None:
    ledger.clear()
    build_tracker(configured(trackers=("ledger",)), tmp_path, is_main=False).finish({})
    assert not ledger


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("mlfow", r"--log.trackers=mlfow: Accelerate knows aim, .*\. Did you mean mlflow\?"),
        ("wandb", "--log.trackers=wandb: it has a setting of its own, --log.wandb"),
        ("comet_ml", "--log.trackers=comet_ml: its package is not installed: pip install comet_ml"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(
    name: str, complaint: str, ledger: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.run.accelerate.get_available_trackers", lambda: ["mlflow"])
    require_trackers(("mlflow", "ledger"))
    with pytest.raises(UserError, match=complaint):
        require_trackers(("mlflow", name))


@pytest.fixture
def installed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tracker's package, whose stores are in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    package = pytest.importorskip(request.param)
    assert request.param in map(str, get_available_trackers())
    PartialState(cpu=True)
    yield package


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("installed", ["mlflow"], indirect=True)
def test_mlflow_has_every_scalar(installed: Any, tmp_path: Path) -> None:
    expected = log_two_steps(configured(trackers=("mlflow",)), tmp_path / "digits")
    client = installed.MlflowClient()
    (experiment,) = [found for found in client.search_experiments() if found.name == "lockstep"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "digits" and run.data.params["optim.lr"] == "0.001"
    names = {name for point in expected for name in point} - {"step"}
    found = {
        (name, point.step, point.value) for name in names for point in client.get_metric_history(run.info.run_id, name)
    }
    assert found == {(name, p["step"], value) for p in expected for name, value in p.items() if name != "step"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("installed", ["trackio"], indirect=True)
def test_trackio_has_every_scalar(installed: Any, tmp_path: Path) -> None:
    expected = log_two_steps(configured(trackers=("trackio",)), tmp_path / "digits")
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("lockstep") == ["digits"]
    logged = SQLiteStorage.get_logs("lockstep", "digits")
    assert [{key: value for key, value in line.items() if key != "timestamp"} for line in logged] == expected
