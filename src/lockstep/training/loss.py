"""Losses: one number per sample.

Nothing is averaged here. A mean over a microbatch would weigh the samples of a short one more than others; the caller
sums these numbers and divides by the size of the global batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.errors import UserError
from lockstep.settings.config import Config, TrainConfig
from lockstep.settings.registry import choose

IGNORED = -100
"""The target of a sample that has no say: its loss and its gradient are 0."""

Loss = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    logits = _at_least_float32(logits)
    if not targets.is_floating_point():
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)
    # Smoothed here and not by torch, which would smooth an ignored row of zeros into a row that counts.
    targets = targets.to(logits.dtype)
    targets = targets.lerp(targets.mean(dim=1, keepdim=True), label_smoothing)
    return F.cross_entropy(logits, targets, reduction="none")


def _bce(
    logits: Tensor, targets: Tensor, label_smoothing: float, bce_target_threshold: float | None, bce_sum: bool
) -> Tensor:
    logits = _at_least_float32(logits)
    if not targets.is_floating_point():
        classes = F.one_hot(targets.clamp(min=0), logits.shape[1])
        targets = classes * (targets != IGNORED)[:, None]
    targets = targets.to(logits.dtype)
    has_say = targets.sum(dim=1) > 0
    targets = targets.lerp(targets.mean(dim=1, keepdim=True), label_smoothing)
    if bce_target_threshold is not None:
        targets = (targets > bce_target_threshold).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses.sum(dim=1) if bce_sum else losses.mean(dim=1)).where(has_say, 0)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    log_probabilities = F.log_softmax(_at_least_float32(logits), dim=1)
    if not targets.is_floating_point():
        return F.nll_loss(log_probabilities, targets, ignore_index=IGNORED, reduction="none")
    return -(targets * log_probabilities).sum(dim=1)


class Record(NamedTuple):
    """A function of logits and targets, and the settings of TrainConfig that are further arguments of its own."""

    compute: Callable[..., Tensor]
    settings: frozenset[str] = frozenset()


LOSSES = {
    "cross_entropy": Record(_cross_entropy, frozenset({"label_smoothing"})),
    "bce": Record(_bce, frozenset({"label_smoothing", "bce_target_threshold", "bce_sum"})),
    "nll": Record(_nll),
}


def build_loss(config: TrainConfig, weights: Tensor | None = None) -> Loss:
    """The loss of `config`: logits (B, C) and targets to losses (B,).

    Targets are int64 classes (B,), `IGNORED` among them, or floating shares of each class (B, C) as mixup and cutmix
    make them: rows sum to 1, a row of zeros is ignored. Losses are computed in float32 at least, in float64 for float64
    logits. Label smoothing (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567) gives its share of every target to
    all classes alike. With bce each class of a sample is a yes or no of its own ("ResNet strikes back", Wightman et al.
    2021, https://arxiv.org/abs/2110.00476).
    `weights` (C,), if given, multiply the loss of a sample by the weight of its class, or by the
    mean over its shares of classes.
    Raises UserError for an unknown name or a setting without a meaning for it.
    """
    record = choose(LOSSES, "train.loss", config)
    loss_of = partial(record.compute, **{setting: getattr(config, setting) for setting in record.settings})
    return loss_of if weights is None else partial(_weighted, loss_of, weights)


def _weighted(loss_of: Loss, weights: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    losses = loss_of(logits, targets)
    if targets.is_floating_point():
        return losses * (targets * weights).sum(dim=1).to(losses.dtype)
    return losses * weights.to(losses.dtype)[targets.clamp(min=0)]


def weights_of_classes(config: Config, labels: np.ndarray, num_classes: int) -> Tensor | None:
    """Weights (C,), float64, that `train.class_weights` asks for, of a training set with these `labels`; None for none.

    They are scaled so that their mean over the samples that training draws is 1. Dividing by the batch size, and not
    as torch's weighted mean by the sum of weights that a batch happens to have, keeps a step's gradient a sum over
    samples: the same on any launch, and of the size that it has without weights. `balanced` is N / (C * n) for classes
    of n samples, as in scikit-learn. Raises UserError for another number of weights than classes.
    """
    asked, counts = config.train.class_weights, np.bincount(labels[labels >= 0], minlength=num_classes)
    if asked == "none":
        return None
    weights = 1 / np.maximum(counts, 1) if asked == "balanced" else np.array(asked, dtype=np.float64)
    if len(weights) != num_classes:
        raise UserError(f"--train.class_weights has {len(weights)} numbers, but the network {num_classes} classes")
    drawn = (counts > 0).astype(np.float64) if config.data.sampling == "balanced" else counts
    mean = (weights * drawn).sum() / drawn.sum()
    if mean == 0:
        raise UserError("--train.class_weights is 0 for every class of the training set")
    weights = np.where(counts > 0, weights / mean, 1.0) if asked == "balanced" else weights / mean
    return torch.from_numpy(weights)


def total(losses: Tensor) -> Tensor:
    """The sum of losses (B,), whose gradient is NaN if it is not finite.

    An infinite loss can have finite gradients. This way whoever gets the sum of all gradients, with every process's
    part in it, sees that one loss was not finite, and no process has to tell the others.
    """
    loss = losses.sum()
    return loss * (0 * loss.detach() + 1)  # the factor is 1, or NaN


def _at_least_float32(logits: Tensor) -> Tensor:
    # bfloat16 keeps 8 bits of the sum of exponentials: enough for a forward pass, not for the loss that is logged.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
