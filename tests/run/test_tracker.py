"""metrics.jsonl is the source of truth: copies may fail, it may not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from logs import configured, train_record
from torch import nn

from lockstep.run.console import Console
from lockstep.run.history import read_history
from lockstep.run.tracker import Tracker, build_tracker


def test_log_writes_one_line_at_once_and_reads_back(tmp_path: Path) -> None:
    tracker = build_tracker(configured(), tmp_path / "run", is_main=True)
    first = train_record(1, loss=torch.tensor(0.5), accuracy=np.float32(0.25), per_class=np.array([1, 2]))
    tracker.log(first)
    tracker.log(train_record(2, loss=math.nan, gradient_norm=math.inf, low=-math.inf))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # before finish: nothing may wait in a buffer
    tracker.finish({})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [1, 2]
    one, two = read_history(tmp_path / "run")
    assert (one["loss"], one["accuracy"], one["per_class"]) == (0.5, 0.25, [1, 2])
    assert math.isnan(two["loss"]) and two["gradient_norm"] == math.inf and two["low"] == -math.inf


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to play a full disk")
def test_a_full_disk_ends_training_and_names_the_file(tmp_path: Path) -> None:
    tracker = build_tracker(configured(), tmp_path, is_main=True)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker.finish({})
    tracker = Tracker(tmp_path, Console(1))
    with pytest.raises(OSError, match=r"cannot write metrics: No space left on device: .*metrics\.jsonl"):
        tracker.log(train_record(1))


def test_other_processes_leave_no_trace(tmp_path: Path, capsys) -> None:
    config = configured(wandb="offline", tensorboard=True)
    tracker = build_tracker(config, tmp_path / "run", is_main=False, environment={"a": 1})
    tracker.start(10, 0)
    tracker.advance(1)
    tracker.log(train_record(1))
    tracker.say("hello")
    tracker.histograms(1, {"w": torch.ones(3)})
    tracker.figure("curves", tmp_path / "missing.png")
    tracker.text("a", "b")
    tracker.graph(nn.Linear(1, 1), torch.ones(1, 1))
    tracker.finish({})
    assert not any(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_a_copy_that_fails_is_dropped_with_one_warning(tmp_path: Path, capsys) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True)
    tracker.log(train_record(1))
    tracker.finish({})
    assert capsys.readouterr().out.startswith("warning: TensorBoard is off (")

    (tmp_path / "tensorboard").unlink()
    tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True, resume_step=1)
    tracker.figure("curves", tmp_path / "missing.png")
    tracker.figure("curves", tmp_path / "missing.png")
    tracker.log(train_record(2))
    tracker.finish({})
    assert capsys.readouterr().out.count("warning: TensorBoard stopped (") == 1
    assert [record["step"] for record in read_history(tmp_path)] == [1, 2]


def test_a_history_that_is_removed_is_told_and_begun_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = build_tracker(configured(), tmp_path, is_main=True)
    tracker.log(train_record(1))
    (tmp_path / "metrics.jsonl").unlink()
    tracker.log(train_record(2))
    tracker.log(train_record(3))
    tracker.finish({})
    assert [line["step"] for line in read_history(tmp_path)] == [2, 3]
    assert caplog.text.count("metrics.jsonl was removed") == 1
