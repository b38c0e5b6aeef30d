"""Losses per sample against torch's means, against formulas, and at the edges: ignored samples and low precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from lockstep.errors import UserError
from lockstep.settings.config import Config, DataConfig, TrainConfig
from lockstep.training.loss import build_loss, total, weights_of_classes

BCE = [TrainConfig(loss="bce"), TrainConfig(loss="bce", label_smoothing=0.1, bce_target_threshold=0.2, bce_sum=True)]
CONFIGS = [TrainConfig(), TrainConfig(label_smoothing=0.1), TrainConfig(loss="nll")]


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3
    return logits.to(dtype).requires_grad_(), torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("config", CONFIGS)
def test_the_mean_is_torchs_loss(config: TrainConfig) -> None:
    logits, targets = batch()
    losses = build_loss(config)(logits, targets)
    assert losses.shape == (6,)
    expected = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_shares_of_one_class_are_that_class(config: TrainConfig) -> None:
    logits, targets = batch()
    loss = build_loss(config)
    shares = F.one_hot(targets, 5)
    for dtype in (torch.float64, torch.float32):  # augmentation makes float32 shares whatever the network's type
        soft = loss(logits, shares.to(dtype))
        assert soft.dtype == torch.float64
        torch.testing.assert_close(soft, loss(logits, targets), rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_mixed_shares_are_torchs_loss(config: TrainConfig) -> None:
    logits, targets = batch()
    shares = 0.3 * F.one_hot(targets, 5).double() + 0.7 * F.one_hot(targets.flip(0), 5).double()
    losses = build_loss(config)(logits, shares)
    expected = F.cross_entropy(logits, shares, reduction="none", label_smoothing=config.label_smoothing)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)


def test_nll_is_cross_entropy_in_value_and_gradient() -> None:
    results = []
    for config in (TrainConfig(loss="cross_entropy"), TrainConfig(loss="nll")):
        logits, targets = batch()
        losses = build_loss(config)(logits, targets)
        losses.sum().backward()
        results.append((losses, logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=1e-16)


def test_label_smoothing_matches_its_formula() -> None:
    logits, targets = batch()
    losses = build_loss(TrainConfig(label_smoothing=0.2))(logits, targets)
    log_probabilities = logits.log_softmax(dim=1)
    chosen = log_probabilities[torch.arange(6), targets]
    torch.testing.assert_close(losses, -0.8 * chosen - 0.2 * log_probabilities.mean(dim=1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("config", CONFIGS + BCE)
def test_ignored_samples_have_no_loss_and_no_gradient(config: TrainConfig, soft: bool) -> None:
    loss = build_loss(config)
    logits, targets = batch()
    everyone = loss(logits, targets).detach()
    targets[[1, 3]] = -100
    if soft:
        targets = F.one_hot(targets.clamp(min=0), 5) * (targets >= 0).unsqueeze(1).double()
    losses = loss(logits, targets)
    losses.sum().backward()
    assert losses[[1, 3]].tolist() == [0, 0]
    torch.testing.assert_close(losses[[0, 2, 4, 5]], everyone[[0, 2, 4, 5]])
    assert logits.grad is not None
    assert logits.grad[[1, 3]].abs().max() == 0 and logits.grad[[0, 2, 4, 5]].abs().min() > 0


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("config", CONFIGS + BCE)
def test_low_precision_logits_get_a_float32_loss(config: TrainConfig, soft: bool) -> None:
    logits, targets = batch(torch.bfloat16)
    if soft:
        targets = F.one_hot(targets, 5).bfloat16()
    losses = build_loss(config)(logits, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, build_loss(config)(logits.float(), targets.float() if soft else targets))
    with torch.autocast("cpu", torch.bfloat16):
        assert build_loss(config)(logits, targets).dtype == torch.float32


WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.25], dtype=torch.float64)


def test_weighted_losses_are_torchs() -> None:
    """Without torch's division by the sum of a batch's weights, which would tie microbatches to one another."""
    logits, targets = batch()
    losses = build_loss(TrainConfig(), WEIGHTS)(logits, targets)
    expected = F.cross_entropy(logits, targets, weight=WEIGHTS, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        losses.sum() / WEIGHTS[targets].sum(), F.cross_entropy(logits, targets, weight=WEIGHTS), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_the_weight_of_mixed_classes_is_the_mean_of_theirs(config: TrainConfig) -> None:
    logits, targets = batch()
    shares = 0.3 * F.one_hot(targets, 5).double() + 0.7 * F.one_hot(targets.flip(0), 5).double()
    weights = 0.3 * WEIGHTS[targets] + 0.7 * WEIGHTS[targets.flip(0)]
    losses = build_loss(config, WEIGHTS)(logits, shares)
    torch.testing.assert_close(losses, build_loss(config)(logits, shares) * weights, rtol=1e-14, atol=0)
    nobody = build_loss(config, WEIGHTS)(logits, torch.full((6,), -100))
    assert nobody.tolist() == [0] * 6


def test_weights_of_classes_have_a_mean_of_1_over_what_is_drawn() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, -100])
    assert weights_of_classes(Config(), labels, 3) is None
    balanced = weights_of_classes(Config(train=TrainConfig(class_weights="balanced")), labels, 4)
    expected = [*compute_class_weight("balanced", classes=np.arange(3), y=labels[:6]), 1.0]  # a class of no sample
    assert balanced is not None and balanced.tolist() == pytest.approx(expected)
    given = Config(train=TrainConfig(class_weights=(1.0, 2.0, 3.0)))
    weights = weights_of_classes(given, labels, 3)
    assert weights is not None and weights[labels[:6]].mean() == pytest.approx(1)
    assert (weights / weights[0]).tolist() == pytest.approx([1, 2, 3])
    often = weights_of_classes(replace(given, data=DataConfig(sampling="balanced")), labels, 3)
    assert often is not None and often.tolist() == pytest.approx([0.5, 1, 1.5]), "each class is drawn as often"
    with pytest.raises(UserError, match="--train.class_weights has 3 numbers, but the network 4 classes"):
        weights_of_classes(given, labels, 4)
    with pytest.raises(UserError, match="--train.class_weights is 0 for every class of the training set"):
        weights_of_classes(Config(train=TrainConfig(class_weights=(0.0, 0.0, 0.0, 1.0))), labels, 4)


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2, 0.26])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timms(smoothing: float, threshold: float | None, sum_classes: bool) -> None:
    logits, targets = batch()
    loss = build_loss(
        TrainConfig(loss="bce", label_smoothing=smoothing, bce_target_threshold=threshold, bce_sum=sum_classes)
    )
    theirs = BinaryCrossEntropy(smoothing, threshold, sum_classes=sum_classes)
    torch.testing.assert_close(loss(logits, targets).mean(), theirs(logits, targets), rtol=1e-12, atol=0)
    # timm's Mixup smooths soft targets itself.
    shares = mixup_target(targets, 5, 0.75).double()
    smoothed = mixup_target(targets, 5, 0.75, smoothing).double()
    torch.testing.assert_close(loss(logits, shares).mean(), theirs(logits, smoothed), rtol=1e-6, atol=0)


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"--train.loss=crossentropy is not one of cross_entropy, bce, nll\. Did you mean cross_entropy\?",
    ):
        build_loss(TrainConfig(loss="crossentropy"))


def test_a_setting_that_only_other_losses_have_is_refused() -> None:
    with pytest.raises(ValueError, match="--train.label_smoothing=0.1 has no meaning for --train.loss=nll: remove it"):
        build_loss(TrainConfig(loss="nll", label_smoothing=0.1))


def test_a_total_that_is_not_finite_has_no_finite_gradient() -> None:
    """Its terms may have one: the infinite loss of a class with probability 0 does not depend on other classes."""
    for spoilt in (torch.inf, -torch.inf, torch.nan):
        weights = torch.ones(3, requires_grad=True)
        total(weights * 2 + torch.tensor([0.0, spoilt, 0.0])).backward()
        assert weights.grad is not None and weights.grad.isnan().all()
    weights = torch.ones(3, requires_grad=True)
    loss = total(weights * 2)
    loss.backward()
    assert loss == 6 and torch.equal(weights.grad, torch.full((3,), 2.0))
