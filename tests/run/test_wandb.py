"""Offline without a server, one W&B run for life, and never in the way."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logs import configured, train_record, wandb_points, wandb_records

from lockstep.run.console import Console
from lockstep.run.exhibit import Artifact, Confusion, Gallery, Scores, Table
from lockstep.run.history import read_history
from lockstep.run.tracker import Tracker, build_tracker


def wandb_data(run_dir: Path) -> bytes:
    """The records of the newest start of the offline run."""
    import wandb

    wandb.teardown()  # as at the end of a process: the last bytes are written when W&B's own process ends
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))[-1].read_bytes()


def test_wandb_without_a_key_runs_offline_and_says_so(tmp_path: Path, wandb_home: Path, capsys) -> None:
    from PIL import Image

    run_dir = tmp_path / "runs" / "digits"
    tracker = build_tracker(configured(wandb="auto"), run_dir, is_main=True, environment={"processes": 2})
    lines = capsys.readouterr()
    assert lines.out.splitlines() == [f"W&B: offline, to be uploaded with: wandb sync {run_dir}/wandb/offline-run-*"]
    assert lines.err == ""
    tracker.log(train_record(1, loss=0.625, note="not a number"))
    tracker.log({"step": 1, "split": "val", "accuracy": 0.5})
    tracker.histograms(1, {"weights": torch.ones(4)})
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    tracker.figure("samples", tmp_path / "picture.png")
    tracker.finish({"best_accuracy": 0.875})
    data = wandb_data(run_dir)
    for expected in (b"train/loss", b"0.625", b"val/accuracy", b"best_accuracy", b"0.875", b"processes", b"a note"):
        assert expected in data, expected
    assert b"weights" in data and list(run_dir.glob("wandb/*/files/media/images/samples*.png"))
    assert len((run_dir / "wandb" / "run_id").read_text()) == 8
    assert "warning" not in capsys.readouterr().out


def test_wandb_keeps_its_id_over_restarts(tmp_path: Path, wandb_home: Path) -> None:
    ids = []
    for resume_step in (0, 1):
        tracker = build_tracker(configured(wandb="offline"), tmp_path, is_main=True, resume_step=resume_step)
        tracker.log(train_record(resume_step + 1))
        tracker.finish({}, exit_code=resume_step)
        ids.append((tmp_path / "wandb" / "run_id").read_text())
        assert ids[0].encode() in wandb_data(tmp_path)
        time.sleep(1.1)  # W&B names folders by the second
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2


def test_wandb_online_without_a_key_never_asks(tmp_path: Path, wandb_home: Path, capsys) -> None:
    tracker = build_tracker(configured(wandb="online"), tmp_path, is_main=True)
    tracker.log(train_record(1))
    tracker.finish({})
    assert capsys.readouterr().out.splitlines()[0].startswith("warning: W&B has no API key: going on offline")
    assert b"train/loss" in wandb_data(tmp_path)


@pytest.mark.parametrize("netrc", [False, True])
def test_wandb_with_an_unreachable_server_goes_on_offline(
    netrc: bool, tmp_path: Path, wandb_home: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("lockstep.run.wandb.INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard: nobody listens
    if netrc:
        (tmp_path / "no-netrc").write_text(f"machine 127.0.0.1:9 login user password {'0' * 40}\n")
        (tmp_path / "no-netrc").chmod(0o600)
    else:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    started = time.monotonic()
    tracker = build_tracker(configured(wandb="auto"), tmp_path / "run", is_main=True)
    tracker.log(train_record(1))
    tracker.finish({})
    assert time.monotonic() - started < 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning: W&B is not reachable (") and lines[1].startswith("W&B: offline")
    assert b"train/loss" in wandb_data(tmp_path / "run")


@pytest.mark.parametrize(("mode", "made"), [("disabled", False), ("offline", True)])
def test_wandb_mode_of_the_environment_is_honoured(
    mode: str, made: bool, tmp_path: Path, wandb_home: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    build_tracker(configured(wandb="auto"), tmp_path, is_main=True).finish({})
    assert (tmp_path / "wandb").exists() == made


def test_wandb_that_cannot_start_is_one_warning(tmp_path: Path, wandb_home: Path, capsys) -> None:
    (tmp_path / "wandb").write_text("a file where the folder should be")
    tracker = build_tracker(configured(wandb="offline"), tmp_path, is_main=True)
    tracker.log(train_record(1))
    tracker.finish({})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning: W&B is off (") and len(lines) == 2
    assert len(read_history(tmp_path)) == 1


def test_tables_wait_for_their_upload_in_the_run_folder(tmp_path: Path, wandb_home: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_DATA_DIR")
    tracker = build_tracker(configured(wandb="offline"), tmp_path / "run", is_main=True)
    tracker.exhibit("layers", lambda: Table(("layer", "parameters"), [("conv", 9), ("head", 20)]))
    tracker.finish({})
    records = wandb_records(next((tmp_path / "run" / "wandb").glob("offline-run-*")))
    staged = [
        Path(entry["local_path"])
        for record in records
        if record["type"] == "artifact"
        for entry in record["artifact"]["manifest"]["contents"]
    ]
    assert len(staged) == 1 and staged[0].parent == tmp_path / "run" / "wandb" / "artifacts" / "staging"
    assert json.loads(staged[0].read_text())["data"] == [["conv", 9], ["head", 20]]


class FakeRun:
    """A W&B run whose every call does `trouble`."""

    id, offline = "abcd1234", False

    def __init__(self, trouble: Callable[[], None]) -> None:
        self._trouble = trouble
        self.summary = self

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def _meet(self, *_: Any, **__: Any) -> None:
        self._trouble()

    log = log_artifact = alert = update = finish = _meet


ARRAY = np.zeros((1, 4, 4, 1), np.uint8)
CALLS: dict[str, Callable[[Tracker, Path], None]] = {
    "scalars": lambda tracker, place: tracker.log(train_record(7)),
    "histogram": lambda tracker, place: tracker.histograms(1, {"weights": torch.ones(4)}),
    "image": lambda tracker, place: tracker.figure("samples", place),
    "text": lambda tracker, place: tracker.text("diagnosis", "all is well"),
    "table": lambda tracker, place: tracker.exhibit("layers", lambda: Table(("layer",), [("conv",)])),
    "gallery": lambda tracker, place: tracker.exhibit("samples", lambda: Gallery(ARRAY, ["one"])),
    "confusion": lambda tracker, place: tracker.exhibit("confusion", lambda: Confusion(*np.eye(2, dtype=int), "ab")),
    "curves": lambda tracker, place: tracker.exhibit("pr", lambda: Scores(np.arange(2), np.eye(2), {1: "dog"})),
    "artifact": lambda tracker, place: tracker.exhibit("model", lambda: Artifact("model", [place], ["best"])),
    "alert": lambda tracker, place: tracker.alert("stopped", "after step 7"),
    "close": lambda tracker, place: tracker.finish({}),
}


def break_down() -> None:
    raise RuntimeError("No space left on device")


@pytest.mark.parametrize("trouble", [break_down, threading.Event().wait], ids=["raises", "hangs"])
@pytest.mark.parametrize("call", CALLS)
def test_no_call_of_wandb_holds_up_training(
    call: str, trouble: Callable[[], None], tmp_path: Path, wandb_home: Path, monkeypatch, capsys
) -> None:
    from PIL import Image

    from lockstep.run import wandb as wandb_module

    ended = []
    monkeypatch.setattr(wandb_module, "CALL_SECONDS", 0.3)
    monkeypatch.setattr(wandb_module, "FINISH_SECONDS", 0.24)
    monkeypatch.setattr(wandb_module, "_abandon_wandb", lambda: ended.append(True))
    Image.new("RGB", (4, 4)).save(picture := tmp_path / "picture.png")
    sink = wandb_module.Wandb(FakeRun(trouble))
    tracker = Tracker(tmp_path, Console(1), [sink])
    started = time.monotonic()
    CALLS[call](tracker, picture)
    assert time.monotonic() - started < 2
    told = "No space left on device" if trouble is break_down else "no end after 0 seconds"
    line = capsys.readouterr().out.splitlines()[0]
    assert line == f"warning: W&B stopped ({told}); metrics.jsonl goes on without it"
    assert bool(ended) == (trouble is not break_down)
    if call != "close":
        tracker.log(train_record(8))
        tracker.alert("not", "tried again")
        assert read_history(tmp_path)[-1]["step"] == 8 and "warning" not in capsys.readouterr().out
        tracker.finish({})


def test_an_alert_is_for_runs_that_are_online(wandb_home: Path) -> None:
    from lockstep.run.wandb import Wandb

    told = []
    run = FakeRun(lambda: told.append(True))
    Wandb(run).alert("stopped", "after step 7")
    assert len(told) == 1
    run.offline = True
    Wandb(run).alert("stopped", "after step 7")
    assert len(told) == 1


def test_curves_in_wandb_are_those_of_their_own_class(wandb_home: Path) -> None:
    from lockstep.run.wandb import _as_curves

    labels = np.array([0, 2, 2, 0])  # class 1 has no sample: W&B's own function would take its column for class 2's
    probabilities = np.array([[0.8, 0.1, 0.1], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7], [0.4, 0.2, 0.4]])
    charts = _as_curves(Scores(labels, probabilities, {1: "cat", 2: "dog"}))
    assert charts["pr_curves"].table.columns == ["class", "recall", "precision"]
    assert charts["pr_curves"].table.data == [
        ["dog", 0.0, 1.0],
        ["dog", 0.5, 1.0],
        ["dog", 0.5, 0.5],
        ["dog", 1.0, pytest.approx(2 / 3)],
        ["dog", 1.0, 0.5],
    ]
    assert [row[1:] for row in charts["roc_curves"].table.data] == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]


def test_an_evaluation_is_a_wandb_run_of_its_own(tmp_path: Path, wandb_home: Path, capsys) -> None:
    from lockstep.run.wandb import Wandb, open_evaluation, run_id

    trained = run_id(tmp_path)
    copy = Wandb(open_evaluation(configured(wandb="offline"), tmp_path, "step_00000060-test", print))
    copy.scalars(60, {}, {"test/accuracy": 0.75})
    copy.close({"split": "test"}, 0)
    import wandb

    wandb.teardown()
    (part,) = (tmp_path / "wandb" / "eval" / "wandb").glob("offline-run-*")
    made = next(record["run"] for record in wandb_records(part) if record["type"] == "run")
    assert (made["run_id"], made["job_type"]) == (f"{trained}-step_00000060-test", "eval")
    assert made["run_group"] == tmp_path.name and made["display_name"] == f"{tmp_path.name} step_00000060-test"
    assert wandb_points(wandb_records(part)) == [{"test/accuracy": 0.75, "step": 60}]
    assert f"wandb sync {part.parent}/offline-run-*" in capsys.readouterr().out
    assert not (tmp_path / "wandb" / "latest-run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_wandb_that_hangs_holds_up_neither_the_end_nor_the_exit(tmp_path: Path, wandb_home: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import psutil
import lockstep.run.wandb
from lockstep.run.tracker import build_tracker
from lockstep.settings.config import Config, LogConfig
config = Config(log=LogConfig(wandb="offline", tensorboard=False))
tracker = build_tracker(config, Path({str(tmp_path / "run")!r}), is_main=True)
lockstep.run.wandb.FINISH_SECONDS = 1.0
service = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
assert service
for process in service:
    process.suspend()
tracker.finish({{}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "warning: W&B stopped (no end after 1 seconds)" in done.stdout


def test_wandb_disabled_is_not_even_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from lockstep.settings.config import Config, LogConfig
from lockstep.run.tracker import build_tracker
config = Config(log=LogConfig(wandb="disabled", tensorboard=False))
tracker = build_tracker(config, Path({str(tmp_path)!r}), is_main=True)
tracker.log({{"step": 1, "split": "train", "loss": 1.0}})
tracker.finish({{}})
late = [name for name in ("wandb", "torch", "tensorboard", "matplotlib", "tqdm", "numpy") if name in sys.modules]
assert not late, late
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
