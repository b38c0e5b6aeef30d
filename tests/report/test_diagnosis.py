"""What is found wrong with a run: each rule by a history made by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.probe import Probe
from lockstep.report.diagnosis import (
    Doubt,
    Evidence,
    Finding,
    diagnose,
    doubt_of,
    levels_of,
    read_evidence,
    write_diagnosis,
)
from lockstep.run.history import HISTORY
from lockstep.settings.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from lockstep.training.loss import build_loss

CONFIG = Config(optim=OptimConfig(lr=0.01))
SOUND = [2.0, 1.2, 0.8, 0.6, 0.5, 0.45, 0.42, 0.4]
STUCK = [2.31, 2.3, 2.3, 2.3, 2.3, 2.3]
HEALTHY = Probe(64, 0.9, {"relu": 0.1}, {"first": 0.5, "last": 1.0}, 0.8)


def history(train: list[float], val: list[float] | None = None, **more: Any) -> list[dict[str, Any]]:
    """An epoch of one line for each training loss; accuracies fall as losses rise unless they are given."""
    lines: list[dict[str, Any]] = []
    validated = train if val is None else val
    accuracies = more.pop(
        "accuracies", [(max(0.1, 1 - a / 2.5), max(0.1, 1 - b / 2.5)) for a, b in zip(train, validated, strict=True)]
    )
    for number, (loss, val_loss, pair) in enumerate(zip(train, validated, accuracies, strict=True), start=1):
        place = {"step": 10 * number, "epoch": number}
        line = {"split": "train", "loss": loss, "accuracy": pair[0], "lr": 0.01, "grad_norm": 1.0, "data_share": 0.02}
        lines.append({**place, **line, **{key: values[number - 1] for key, values in more.items()}})
        validation = {
            "split": "val",
            "loss": val_loss,
            "accuracy": pair[1],
            "train_loss": loss,
            "train_accuracy": pair[0],
        }
        lines.append({**place, **validation})
    return lines


def found(
    records: list[dict[str, Any]], probe: Probe | None = HEALTHY, config: Config = CONFIG, **more: Any
) -> list[Finding]:
    return diagnose(Evidence(config, 10, records, probe, **more))


def the_one(*arguments: Any, **more: Any) -> Finding:
    (finding,) = found(*arguments, **more)
    return finding


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (SOUND, None),
        (SOUND, [1.8, 1.0, 0.7, 0.6, 0.55, 0.54, 0.53, 0.54]),
        ([0.3, 0.1, 0.03, 0.01, 0.003], [0.1, 0.05, 0.04, 0.05, 0.06]),  # a rise that is nothing beside guessing
        ([2.3, 1.5, 1.6, 1.1, 0.9, 0.8, 0.75, 0.7], None),  # one bad epoch, early
        ([2.0], None),
    ],
)
def test_sound_runs_are_left_in_peace(train: list[float], val: list[float] | None) -> None:
    assert found(history(train, val)) == []
    assert found(history(train, val), None) == []


def test_a_run_without_an_epoch_is_not_judged() -> None:
    assert found([]) == []


def test_a_few_steps_are_too_few_for_a_loss_to_fall() -> None:
    assert found(history([2.3]), replace(HEALTHY, moved=0.003)) == []
    assert found(history([2.3]), replace(HEALTHY, gradients={"first": 1e-9, "last": 1.0})) == []
    assert the_one(history([2.3, 2.3])).sign == "loss does not fall"
    assert the_one(history([math.nan])).sign == "exploding gradients"


def test_lines_of_training_do_without_validations() -> None:
    lines = [line for line in history(STUCK) if line["split"] == "train"]
    assert the_one(lines).sign == "loss does not fall"


def test_exploding_gradients() -> None:
    bad = the_one(history(SOUND, bad_steps=[0, 0, 3, 2, 0, 0, 0, 0]))
    assert bad.sign == "exploding gradients" and "5 steps" in bad.evidence and "epoch 3" in bad.evidence
    assert bad.advice == "--optim.clip_norm=1"
    peak = the_one(
        history(SOUND, grad_norm=[1, 1, 1, 2e4, 1, 1, 1, 1]), config=Config(optim=OptimConfig(clip_norm=1.0))
    )
    assert "2e+04 in epoch 4" in peak.evidence and peak.advice == "--optim.lr=0.0001"


def test_vanishing_gradients_are_no_dead_layer() -> None:
    vanished = replace(HEALTHY, gradients={"first.weight": 1e-7, "middle": 1e-3, "last.weight": 0.1})
    finding = the_one(history(STUCK), vanished)
    assert finding.sign == "vanishing gradients"
    assert finding.evidence.startswith(
        "the gradient of first.weight is 1e-06 times that of last.weight, and train/loss"
    )
    assert found(history(SOUND), vanished) == []
    dead = the_one(history(STUCK), replace(vanished, silent={"a": 0.2, "b": 0.95}))
    assert dead.sign == "dead ReLUs" and "95% of the channels behind b" in dead.evidence
    assert found(history(SOUND), replace(HEALTHY, silent={"b": 0.95})) == []


@pytest.mark.parametrize(
    ("losses", "evidence"),
    [
        ([2.3, 4.0, 3.5, 2.5], "train/loss is 4 in epoch 2, above 2.3,"),
        ([2.0, 1.5, 1.9, 2.2], "rises from 1.5 in epoch 2 to 2.2 at the end"),
        ([9.0, 2.3, 2.3, 2.3], "train/loss is 9 in epoch 1, above 2.3,"),
    ],
)
def test_a_rate_that_is_too_high(losses: list[float], evidence: str) -> None:
    finding = the_one(history(losses), replace(HEALTHY, moved=5.0))
    assert finding.sign == "learning rate too high" and evidence in finding.evidence
    assert finding.advice == "--optim.lr=0.001"


@pytest.mark.parametrize("losses", [[9.0, 4.0, 2.5, 1.2, 0.6], [6.0, 2.6, 2.0], [9.0]])
def test_a_head_that_was_drawn_may_begin_high(losses: list[float]) -> None:
    """Of a fine-tuning, which is not done yet."""
    tuned = replace(CONFIG, model=ModelConfig(pretrained=True))
    assert found(history(losses), replace(HEALTHY, moved=None), config=tuned) == []
    stuck = the_one(history([9.0, 2.4, 2.4]), replace(HEALTHY, moved=None), config=tuned)
    assert stuck.sign == "learning rate too high"


SUMMED = TrainConfig(loss="bce", bce_sum=True)


@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(), TrainConfig(label_smoothing=0.1), SUMMED, TrainConfig(loss="bce"),
        TrainConfig(loss="bce", label_smoothing=0.2), replace(SUMMED, label_smoothing=0.1, bce_target_threshold=0.3),
    ],
)  # fmt: skip
def test_levels_are_those_of_the_loss(train: TrainConfig) -> None:
    """Logits are searched for the lowest loss, the same ones for all labels, or with the label known."""
    loss_of, labels = build_loss(train), torch.arange(10)
    lowest = []
    for start in (torch.zeros(1, 10), torch.zeros(10, 10)):
        logits = start.double().requires_grad_()
        search = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def mean(logits: torch.Tensor = logits, search: torch.optim.LBFGS = search) -> torch.Tensor:
            search.zero_grad()
            loss = loss_of(logits.expand(10, 10), labels).mean()
            loss.backward()
            return loss

        search.step(mean)
        lowest.append(mean().item())
    blank = loss_of(torch.zeros(10, 10).double(), labels).mean().item()
    assert levels_of(Config(train=train), 10) == pytest.approx((blank, *lowest), abs=1e-4)


@pytest.mark.parametrize("train", [TrainConfig(loss="bce"), SUMMED])
def test_losses_of_each_class_have_a_scale_of_their_own(train: TrainConfig) -> None:
    """Binary cross-entropy, which begins at ln(2) a class; validation measures cross-entropy."""
    config, scale = replace(CONFIG, train=train), 10 if train.bce_sum else 1
    sound, stuck = [0.5, 0.31, 0.22, 0.15, 0.1, 0.08], [0.4, 0.33, 0.33, 0.325, 0.325, 0.325]

    def signs(losses: list[float], val: list[float]) -> list[str]:
        lines = history([scale * loss for loss in losses], val, accuracies=[(0.9, 0.8)] * len(losses))
        return [finding.sign for finding in found(lines, config=config)]

    assert signs(sound, [2.2, 1.6, 1.1, 0.8, 0.6, 0.55]) == []
    assert signs(sound[:2], [2.2, 1.6]) == [] and signs(sound[:1], [2.2]) == []
    assert signs(stuck, 6 * [2.3]) == ["loss does not fall"]
    assert signs([0.4, 0.9, 0.8, 0.33], 4 * [2.3]) == ["learning rate too high"]


def test_a_rate_that_is_too_low() -> None:
    finding = the_one(history([3.0, 2.9, 2.9]), replace(HEALTHY, moved=0.003))
    assert finding.sign == "learning rate too low" and "moved by 0.3%" in finding.evidence
    assert finding.advice == "--optim.lr=0.1"
    assert found(history(SOUND), replace(HEALTHY, moved=0.003)) == []  # fine-tuning


def test_labels_that_do_not_follow_from_the_images() -> None:
    lines = history([2.0, 1.5, 1.0], [2.4, 2.9, 3.5], accuracies=[(0.2, 0.1), (0.5, 0.1), (0.7, 0.11)])
    finding = the_one(lines, doubt=Doubt(100, 450, 500, "test"))
    assert finding.sign == "labels that do not fit" and "test/accuracy is 10.0%" in finding.evidence
    assert "after 3 epochs, and that of training images 90.0%" in finding.evidence
    unsettled = replace(HEALTHY, accuracy=0.1)  # running statistics of a short training
    assert the_one(lines, unsettled, doubt=Doubt(100, 450, 500, "test")).sign == "overfitting"
    assert the_one(lines, doubt=Doubt(100, 430, 500, "test")).sign == "overfitting"  # 14 % is more than guessing
    few = [(0.9, 0.6), (0.95, 0.6), (1.0, 0.6)]
    pair = Evidence(
        CONFIG, 2, history([0.5, 0.2, 0.1], [0.7, 0.9, 1.1], accuracies=few), HEALTHY, Doubt(9, 33, 100, "test")
    )
    assert [one.sign for one in diagnose(pair)] == ["overfitting"]  # a hard task of two classes, learned by heart


def test_doubtful_labels() -> None:
    finding = the_one(history(SOUND), doubt=Doubt(40, 100, 500, "test"))
    assert finding.sign == "labels that look wrong" and "40 of 500 test images" in finding.evidence
    for few in (Doubt(10, 100, 500, "test"), Doubt(4, 4, 100, "test"), Doubt(200, 260, 500, "test")):
        assert found(history(SOUND), doubt=few) == []
    assert found(history(SOUND[:1]), doubt=Doubt(40, 100, 500, "test")) == []  # 10 steps make no judge


def test_doubt_is_measured_by_the_confidence_of_right_answers() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 0])
    confidences = np.array([0.5, 0.7, 0.9, 0.8, 0.6])
    nothing = np.zeros(5)
    predictions = Predictions(np.arange(5), labels, predicted, confidences, nothing, nothing, 2)
    assert doubt_of(predictions, "val") == Doubt(1, 2, 5, "val")
    wrong = Predictions(np.arange(5), 1 - predicted, predicted, confidences, nothing, nothing, 2)
    assert doubt_of(wrong, "val").samples == 0


def test_symptoms_are_told_where_there_is_no_cause() -> None:
    stuck = the_one(history(STUCK))
    assert stuck.sign == "loss does not fall" and "goes from 2.31 in epoch 1 to 2.3 in epoch 6" in stuck.evidence
    waves = the_one(history([2.0, 1.0, 0.8, 0.9, 0.5, 0.8, 0.4, 0.7, 0.4]))
    assert waves.sign == "oscillating loss" and waves.advice == "--optim.lr=0.003"
    flat = the_one(history([2.0, 1.6, 1.51, 1.5, 1.5, 1.5]))
    assert flat.sign == "underfitting" and "does not fall below 1.50 from epoch 5" in flat.evidence
    done = history([2.0, 1.6, 1.51, 1.5, 1.5, 1.5], lr=[0.01, 0.01, 0.01, 0.005, 1e-4, 1e-5])
    assert found(done) == []  # it stopped learning because its rate did


def test_label_smoothing_is_no_underfitting() -> None:
    losses = [1.8, 1.2, 1.15, 1.15, 1.15, 1.15]  # 0.5 of it cannot be avoided
    smoothed = Config(train=TrainConfig(label_smoothing=0.1))
    assert found(history(losses), config=smoothed) == []
    assert the_one(history(losses), config=Config()).sign == "underfitting"


def test_overfitting() -> None:
    train, val = [1.5, 0.8, 0.4, 0.1, 0.05], [1.4, 0.9, 0.8, 1.0, 1.2]
    finding = the_one(history(train, val))
    assert finding.sign == "overfitting" and "lowest in epoch 3 (0.8) and 1.2 at the end" in finding.evidence
    assert finding.advice == "--augment.translate=0.1"
    gap = the_one(history(SOUND, [2 * loss + 0.01 for loss in SOUND], accuracies=[(0.99, 0.8)] * 8))
    assert (
        gap.sign == "overfitting" and "train/accuracy is 99.0% from epoch 7 on, and val/accuracy 80.0%" in gap.evidence
    )
    smoothed = history(SOUND, SOUND, accuracies=[(0.9, 0.6)] * 8)  # losses with smoothed labels lie closer together
    assert the_one(smoothed).sign == "overfitting"
    assert found(history(SOUND, SOUND, accuracies=[(0.9, 0.8)] * 8)) == []


def test_the_remedy_is_one_that_is_not_used_yet() -> None:
    train, val = [1.5, 0.8, 0.4, 0.1, 0.05], [1.4, 0.9, 0.8, 1.0, 1.2]
    config = Config(augment=AugmentConfig(crop_padding=2))
    assert the_one(history(train, val), config=config).advice == "--optim.weight_decay=0.0005"
    config = replace(config, optim=OptimConfig(weight_decay=0.1))
    assert the_one(history(train, val), config=config).advice == "--train.label_smoothing=0.1"


def test_a_starving_device() -> None:
    shares = [0.9, 0.6, 0.5, 0.6, 0.6, 0.5, 0.5, 0.6]
    finding = the_one(history(SOUND, data_share=shares), config=Config(data=DataConfig(workers=0)))
    assert finding.sign == "starving device" and "60% of the time" in finding.evidence
    assert finding.advice == "--data.workers=-1"
    assert "memory_budget" in the_one(history(SOUND, data_share=shares)).advice


def test_lines_of_others_are_no_evidence() -> None:
    strange = [
        {"step": 5, "split": "train"},
        {"split": "val", "loss": None, "accuracy": "x", "train_loss": 1, "epoch": 1},
    ]
    assert found([*history(SOUND), *strange]) == [] and found(strange) == []


def test_few_images_jump_and_are_learned_by_heart() -> None:
    shares = [(0.3, 0.2), (0.6, 0.3), (0.75, 0.4), (0.8, 0.45), (0.85, 0.5), (0.7, 0.5)]
    finding = the_one(history([2.2, 1.8, 1.3, 1.2, 0.97, 1.29], [2.2, 2.1, 2.0, 1.95, 1.9, 1.9], accuracies=shares))
    assert finding.sign == "overfitting"


def test_advice_has_a_meaning_for_the_network() -> None:
    flat = history([2.0, 1.6, 1.51, 1.5, 1.5, 1.5])
    resnet = replace(CONFIG, model=ModelConfig(name="timm/resnet18"))
    assert the_one(flat, config=resnet).advice == "--model.name=timm/resnet50"
    assert the_one(flat, config=replace(CONFIG, model=ModelConfig(name="mlp"))).advice == "--model.name=timm/resnet18"
    vanished = replace(HEALTHY, gradients={"first": 0.0, "last": 0.1})
    assert the_one(history(STUCK), vanished, config=resnet).advice == "--model.name=timm/resnet18"


def test_numbers_that_are_none_break_nothing() -> None:
    lost = the_one(history([2.0, math.nan, math.nan]))
    assert lost.sign == "exploding gradients" and "not finite from epoch 2 on" in lost.evidence
    assert the_one(history(SOUND, grad_norm=[0, 0, 0, 2e4, 0, 0, 0, 0])).sign == "exploding gradients"
    unknown = Probe(64, math.nan, {"relu": math.nan}, {"first": math.nan, "last": 1.0}, math.nan)
    assert the_one(history(STUCK), unknown).sign == "loss does not fall"


def test_a_diagnosis_is_read_back(tmp_path: Path) -> None:
    assert read_evidence(tmp_path, CONFIG) is None
    (tmp_path / HISTORY).write_text("")
    evidence = Evidence(CONFIG, 10, history(STUCK), HEALTHY, Doubt(1, 2, 3, "test"))
    (finding,) = write_diagnosis(tmp_path, evidence)
    again = read_evidence(tmp_path, CONFIG)
    assert again is not None and (again.probe, again.doubt, again.classes) == (HEALTHY, evidence.doubt, 10)
    unknown = replace(evidence, probe=Probe(64, math.nan, {}, {"first": math.nan, "last": 1.0}, math.nan))
    write_diagnosis(tmp_path, unknown)
    again = read_evidence(tmp_path, CONFIG)
    assert again is not None and again.probe is not None and math.isnan(again.probe.gradients["first"])
    (tmp_path / "diagnosis.json").write_text('{"findings": 3}')
    assert read_evidence(tmp_path, CONFIG) is None
    assert str(finding).startswith("loss does not fall: train/loss goes from") and "; try --optim.lr=" in str(finding)


def test_networks_without_batch_norm_are_told_of_it() -> None:
    vanished = replace(HEALTHY, gradients={"first": 0.0, "last": 0.1})
    plain = replace(CONFIG, model=ModelConfig(batch_norm=False))
    assert the_one(history(STUCK), vanished, config=plain).advice == "--model.batch_norm=true"
