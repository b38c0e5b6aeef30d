"""Exact evaluation: every sample counts once, at any number of processes."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lockstep.augment.transform import Transform
from lockstep.data.images import SKIPPED_LABEL
from lockstep.data.loader import EvaluationLoader
from lockstep.errors import UserError
from lockstep.evaluation.metrics import Predictions
from lockstep.launch.sharding import gathered
from lockstep.randomness import real_type

_COLUMNS = ("seen", "label", "loss", "prediction", "confidence", "better_classes")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvaluationLoader,
    transform: Transform,
    accelerator: Accelerator,
    interrupted: Callable[[], bool] = lambda: False,
) -> Predictions | None:
    """Loss, accuracy and predictions of the bare `model` (not its DDP wrapper, whose forward would wait for others).

    Each process fills in the rows of its own samples and the rows are added up over processes, so that the numbers,
    and the order in which they are summed, are the same at any world size. None on all processes if `interrupted`,
    asked after every batch, was true on any. Raises RuntimeError if a sample was missed or counted twice.
    """
    was_training = model.training
    model.eval()
    # MPS has no float64; float32 still holds counts and class numbers exactly. The last row says who was interrupted.
    dtype = real_type(accelerator.device)
    rows = torch.zeros(len(loader.data) + 1, len(_COLUMNS), dtype=dtype, device=accelerator.device)
    with gathered(model):
        for samples, images, labels in loader:
            rows.index_add_(0, samples, _judge(model(transform.evaluate(images)), labels).to(dtype))
            if interrupted():
                rows[-1] = 1
                break
    model.train(was_training)
    if accelerator.num_processes > 1:
        rows = accelerator.reduce(rows, reduction="sum")
    numbers = rows.cpu().double().numpy()
    return None if numbers[-1].any() else _summarise(numbers[:-1], loader.num_classes)


def _judge(logits: Tensor, labels: Tensor) -> Tensor:
    """One row per sample, (B, columns)."""
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    confidence, prediction = log_probabilities.exp().max(1)
    true = log_probabilities.gather(1, labels.clamp(min=0)[:, None])
    better = (~(log_probabilities <= true)).sum(1)  # so that a network that puts out NaN has no class right
    return torch.stack([torch.ones_like(confidence), labels, -true[:, 0], prediction, confidence, better], 1)


def _summarise(rows: np.ndarray, num_classes: int) -> Predictions:
    seen, labels, losses, predicted, confidences, better = rows.T
    if not (seen == 1).all():
        raise RuntimeError(f"evaluation counted {int(seen.sum())} of {len(seen)} samples, some not exactly once")
    (samples,) = np.nonzero(labels != SKIPPED_LABEL)
    if not len(samples):
        raise UserError("every image of the set was skipped: there is nothing to evaluate")
    return Predictions(
        samples,
        labels[samples].astype(np.int64),
        predicted[samples].astype(np.int64),
        confidences[samples],
        losses[samples],
        better[samples].astype(np.int64),
        num_classes,
        skipped=len(rows) - len(samples),
    )
