"""Lines, and on a terminal a bar."""

import io
import sys
from pathlib import Path

import torch
from logs import configured, train_record

from lockstep.run.tracker import build_tracker


def test_console_prints_a_line_per_record(tmp_path: Path, capsys) -> None:
    tracker = build_tracker(configured(), tmp_path, is_main=True)
    tracker.start(450, 0)
    tracker.advance(150)
    tracker.log(
        {"step": 150, "epoch": 4, "split": "train", "loss": 0.123, "accuracy": 0.961}
        | {"lr": 0.00095, "images_per_second": 5412.3}
    )
    tracker.log({"step": 150, "epoch": 4, "split": "val", "loss": torch.tensor(0.2), "accuracy": 0.95})
    tracker.log({"step": 450, "epoch": 10, "best_step": 300, "split": "test", "loss": 0.2, "accuracy": 0.95})
    tracker.say("saved")
    assert capsys.readouterr().out.splitlines() == [
        "step 150/450  epoch 4/10  loss 0.1230  accuracy 96.1 %  lr 0.00095  5,412 images/s",
        "val    step 150/450  epoch 4/10  loss 0.2000  accuracy 95.0 %",
        "test   step 300/450  loss 0.2000  accuracy 95.0 %",
        "saved",
    ]


def test_terminal_gets_a_bar_that_lines_do_not_break(tmp_path: Path, monkeypatch, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    tracker = build_tracker(configured(), tmp_path, is_main=True, resume_step=2)
    tracker.start(10, 2)
    tracker.advance(9)
    tracker.log(train_record(9, loss=0.5))
    tracker.advance(10)
    before = len(terminal.getvalue())
    tracker.say("saved")
    assert terminal.getvalue()[before:].startswith("\r "), "the bar is not wiped before the line"
    tracker.finish({})
    assert "2/10" in terminal.getvalue() and "10/10" in terminal.getvalue()
    assert "loss 0.5000" in terminal.getvalue().replace("\n", "")
    assert capsys.readouterr().out.splitlines() == ["saved"]
