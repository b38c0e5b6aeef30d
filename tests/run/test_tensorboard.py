"""What event files hold."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from logs import configured, train_record
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

from lockstep.run.exhibit import Scores
from lockstep.run.tracker import build_tracker


def board(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 2))


def test_tensorboard_gets_scalars_histograms_pictures_graph_and_results(tmp_path: Path) -> None:
    from PIL import Image

    tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True)
    tracker.log(train_record(3, train_val_loss_ratio=0.8, note="text is no scalar", flag=True))
    tracker.histograms(
        3, {"weight": torch.tensor([1.0, math.nan, 2.0], dtype=torch.bfloat16), "lost": torch.tensor([])}
    )
    Image.new("RGBA", (20, 10), "red").save(tmp_path / "red.png")
    tracker.figure("samples", tmp_path / "red.png")
    tracker.text("config", "lr: 0.1")
    model, random_state = small_network(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels, probabilities = np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    tracker.exhibit("pr_curves", lambda: Scores(labels, probabilities, {1: "dog"}))
    tracker.graph(model, torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    tracker.finish({"best_accuracy": 0.9, "state": "finished"})

    events = board(tmp_path)
    assert {tag for tag in events.Tags()["scalars"] if not tag.startswith("final/")} == {
        "train/loss",
        "train/lr",
        "train_val_loss_ratio",
    }
    point = events.Scalars("train/loss")[0]
    assert (point.step, point.value) == (3, pytest.approx(1 / 4))
    assert events.Histograms("weight")[0].histogram_value.num == 2 and events.Tags()["histograms"] == ["weight"]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].step) == (20, 3)
    assert b"lr: 0.1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    true_positives, false_positives = make_ndarray(events.Tensors("pr_curves/dog")[0].tensor_proto)[:2]
    assert (true_positives[0], false_positives[0]) == (2, 1) and true_positives[-1] == 0  # at thresholds 0 and 1
    assert events.Tags()["graph"] and "BatchNorm2d" in str(events.Graph())
    assert events.Scalars("final/best_accuracy")[0].value == pytest.approx(0.9)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tensorboard_shows_no_point_twice_after_a_restart(tmp_path: Path) -> None:
    for resume_step, steps in ((0, (0, 1, 2, 3)), (2, (3, 4)), (0, (0, 1))):
        tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True, resume_step=resume_step)
        for step in steps:
            tracker.log(train_record(step))
        tracker.finish({"state": "preempted", "best_accuracy": 0.5})
        expected = [*range(resume_step + 1 if resume_step else 0), *steps]
        assert [point.step for point in board(tmp_path).Scalars("train/loss")] == expected
        time.sleep(1.1)  # event files are told apart by their second
    assert not any(tag.startswith("final/") for tag in board(tmp_path).Tags()["scalars"])


def test_a_network_that_cannot_be_traced_is_a_note(tmp_path: Path, capsys) -> None:
    tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True)
    tracker.graph(nn.Linear(3, 3), torch.ones(1, 4))
    tracker.log(train_record(1))
    tracker.finish({})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note: no graph of the network in TensorBoard (") and len(lines) == 2
    assert board(tmp_path).Tags()["scalars"]
