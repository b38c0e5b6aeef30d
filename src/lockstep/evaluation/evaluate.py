"""Exact evaluation: every sample counts once, at any number of processes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lockstep.augment.transform import Transform
from lockstep.data.images import SKIPPED_LABEL
from lockstep.data.loader import EvaluationLoader
from lockstep.launch.sharding import gathered


@dataclass(frozen=True, eq=False)
class Metrics:
    """What a network does on a set. Arrays are by sample index; samples whose image was skipped are left out."""

    loss: float
    accuracy: float
    top5_accuracy: float
    samples: np.ndarray
    """Indices into the set, int64 (N,)"""
    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    """Probability of the predicted class, (N,)"""
    losses: np.ndarray
    confusion: np.ndarray
    """Counts (classes, classes): row is the label, column the prediction"""

    def headline(self) -> dict[str, float]:
        """loss, accuracy and, where it says something, top5_accuracy."""
        top5 = {"top5_accuracy": self.top5_accuracy} if len(self.confusion) > 10 else {}
        return {"loss": self.loss, "accuracy": self.accuracy, **top5}

    def per_class(self) -> dict[str, np.ndarray]:
        """precision, recall, f1 and support of each class, (classes,); 0 where a class was never predicted or seen."""
        hits = np.diag(self.confusion).astype(float)
        predicted, support = self.confusion.sum(0), self.confusion.sum(1)
        precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
        recall = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
        total = precision + recall
        f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(hits), where=total > 0)
        return {"precision": precision, "recall": recall, "f1": f1, "support": support}


_COLUMNS = ("seen", "label", "loss", "prediction", "confidence", "better_classes")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvaluationLoader,
    transform: Transform,
    accelerator: Accelerator,
    interrupted: Callable[[], bool] = lambda: False,
) -> Metrics | None:
    """Loss, accuracy and predictions of the bare `model` (not its DDP wrapper, whose forward would wait for others).

    Each process fills in the rows of its own samples and the rows are added up over processes, so that the numbers,
    and the order in which they are summed, are the same at any world size. None on all processes if `interrupted`,
    asked after every batch, was true on any. Raises RuntimeError if a sample was missed or counted twice.
    """
    was_training = model.training
    model.eval()
    # MPS has no float64; float32 still holds counts and class numbers exactly. The last row says who was interrupted.
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
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


def _summarise(rows: np.ndarray, num_classes: int) -> Metrics:
    seen, labels, losses, predictions, confidences, better = rows.T
    if not (seen == 1).all():
        raise RuntimeError(f"evaluation counted {int(seen.sum())} of {len(seen)} samples, some not exactly once")
    (samples,) = np.nonzero(labels != SKIPPED_LABEL)
    if not len(samples):
        raise ValueError("every image of the set was skipped: there is nothing to evaluate")
    labels, predictions = labels[samples].astype(np.int64), predictions[samples].astype(np.int64)
    pairs = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return Metrics(
        loss=float(losses[samples].mean()),
        accuracy=float((predictions == labels).mean()),
        top5_accuracy=float((better[samples] < 5).mean()),
        samples=samples,
        labels=labels,
        predictions=predictions,
        confidences=confidences[samples],
        losses=losses[samples],
        confusion=pairs.reshape(num_classes, num_classes),
    )
