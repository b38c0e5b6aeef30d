"""CONTRIBUTING's table, followed to the letter: one new thing of each kind, used by a training."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from programs import QUICK, ROOT, read_lines
from torch import Tensor, nn

from lockstep.__main__ import main
from lockstep.augment.policy import Record as PolicyRecord
from lockstep.augment.transform import Record as TransformRecord
from lockstep.data.sources.source import RowName, Source, Split
from lockstep.errors import UserError
from lockstep.evaluation.metrics import Metric, Predictions
from lockstep.evaluation.scores import Score, scores
from lockstep.models.network import Network
from lockstep.settings.cli import parse_config
from lockstep.training.learner import check_names
from lockstep.training.loss import Record as LossRecord
from lockstep.training.optim import Record as OptimizerRecord
from lockstep.training.schedule import Shape

ROWS = dict(
    re.findall(r"^\| ([a-z ]+) \|[^|]*\| `([A-Z_]+` in `[\w/.]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
)

Train = Callable[..., Path]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Makes the entry `mine` where the table says that things of a kind are entered."""

    def make_entry(kind: str, record: Any) -> None:
        name, place = ROWS[kind].replace("`", "").split(" in ")
        module = importlib.import_module("lockstep." + place.removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(getattr(module, name), "mine", record)

    return make_entry


def test_the_table_was_read() -> None:
    kinds = {"network", "optimizer", "schedule", "loss", "transform", "policy", "metric", "score", "data source"}
    assert set(ROWS) == {*kinds, "command"}


def short(train_here: Train, *arguments: str) -> list[dict[str, Any]]:
    return read_lines(
        train_here(*QUICK, "--train.max_steps=2", "--log.every_steps=1", "--model.name=tiny_cnn", *arguments)
    )


def test_a_network(add: Callable[[str, Any], None], train_here: Train) -> None:
    def build(config: Any, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(image_shape)), num_classes))

    add("network", Network(build, frozenset({"dropout"})))
    lines = short(train_here, "--model.name=mine")
    assert [line["split"] for line in lines] == ["train", "train", "val", "test"]
    with pytest.raises(UserError, match="--model.width=9 has no meaning for --model.name=mine"):
        check_names(parse_config(["--model.name=mine", "--model.width=9"]))


def test_an_optimizer(add: Callable[[str, Any], None], train_here: Train) -> None:
    class Resting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            pass

    add("optimizer", OptimizerRecord(Resting, frozenset({"momentum"})))
    lines = short(train_here, "--optim.name=mine", "--optim.momentum=0.5")
    assert lines[0]["digest"] == lines[1]["digest"]


def test_a_schedule(add: Callable[[str, Any], None], train_here: Train) -> None:
    add("schedule", Shape(lambda schedule, step, validations: 0.5**step))
    lines = short(train_here, "--schedule.name=mine", "--schedule.warmup_epochs=0")
    assert [line["lr"] for line in lines[:2]] == [1.0, 0.5]


def test_a_loss(add: Callable[[str, Any], None], train_here: Train) -> None:
    add("loss", LossRecord(lambda logits, targets: logits.sum(1) * 0 + 7))
    assert short(train_here, "--train.loss=mine", "--train.label_smoothing=0")[0]["loss"] == 7


def test_a_transform(add: Callable[[str, Any], None], train_here: Train) -> None:
    seen = []

    def darken(images: Tensor, keys: Tensor, config: Any) -> Tensor:
        seen.append((images.shape, keys.shape, images.max()))
        return images * 0

    add("transform", TransformRecord("colour", darken, ("noise",)))
    short(train_here, "--augment.noise=0.1")
    assert seen[0][0][0] == seen[0][1][0] == 64 and 0 < seen[0][2] <= 255 * 2


def test_a_policy(add: Callable[[str, Any], None], train_here: Train) -> None:
    seen = []

    def invert(images: Tensor, keys: Tensor, config: Any) -> Tensor:
        seen.append((images.dtype, images.shape[:2], keys.shape))
        return 255 - images

    add("policy", PolicyRecord(invert, frozenset({"policy_ops"})))
    short(train_here, "--augment.policy=mine", "--augment.policy_ops=3")
    assert seen[0] == (torch.uint8, (64, 1), (64,))


def test_a_metric(add: Callable[[str, Any], None], train_here: Train) -> None:
    add("metric", Metric(lambda rows: float((rows.predicted != rows.labels).mean())))
    _, _, val, test = short(train_here)
    assert (val["mine"], test["mine"]) == (pytest.approx(1 - val["accuracy"]), pytest.approx(1 - test["accuracy"]))


def test_a_score(add: Callable[[str, Any], None]) -> None:
    add("score", Score(lambda rows: float(rows.confidences.mean())))
    labels = np.array([0, 1, 1])
    rows = Predictions(np.arange(3), labels, labels, np.array([0.5, 0.6, 1.0]), np.zeros(3), np.zeros(3), 2)
    assert scores(rows)["mine"] == pytest.approx(0.7)


def test_a_data_source(add: Callable[[str, Any], None], train_here: Train) -> None:
    def open_mine(name: str, config: Any) -> Source:
        labels = np.arange(640) % 3

        def read(row: int) -> Image.Image:
            return Image.fromarray(np.full((8, 8), 80 * labels[row], np.uint8))

        train = Split("train", labels, read, RowName(config.source, "train"))
        return Source(config.source, ("dark", "grey", "bright"), {"train": train}, f"mine {name}")

    add("data source", open_mine)
    assert short(train_here, "--data.source=mine:shades")[-1]["split"] == "test"


def test_a_command(add: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    mine = ModuleType("mine")
    mine.main = lambda arguments: called.append(arguments) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lockstep.commands.mine", mine)
    add("command", "what is mine")
    assert main(["mine", "one", "--two"]) == 3 and called == [["one", "--two"]]
