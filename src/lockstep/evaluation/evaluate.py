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
_MOST_PROBABILITIES = 2**28
"""1 GiB of float32: ImageNet's 50,000 x 1,000 are a fifth of it"""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvaluationLoader,
    transform: Transform,
    accelerator: Accelerator,
    interrupted: Callable[[], bool] = lambda: False,
    *,
    with_probabilities: bool = False,
) -> Predictions | None:
    """Loss, accuracy and predictions of the bare `model` (not its DDP wrapper, whose forward would wait for others).

    Each process fills in the rows of its own samples and the rows are added up over processes, so that the numbers,
    and the order in which they are summed, are the same at any world size. None on all processes if `interrupted`,
    asked after every batch, was true on any. `with_probabilities`: those of all classes are kept, where they fit
    into 1 GiB. Raises RuntimeError if a sample was missed or counted twice.
    """
    was_training = model.training
    model.eval()
    tally = _Tally(len(loader.data), loader.num_classes, accelerator, with_probabilities)
    with gathered(model):
        for samples, images, labels in loader:
            tally.add(samples, transform.logits(model, images), labels)
            if interrupted():
                tally.rows[-1] = 1
                break
    model.train(was_training)
    rows, probabilities = tally.over_all_processes()
    return None if rows[-1].any() else _summarise(rows[:-1], probabilities, loader.num_classes)


class _Tally:
    """What is known of each sample of a set, on this process; zero for those of others."""

    def __init__(self, samples: int, classes: int, accelerator: Accelerator, with_probabilities: bool) -> None:
        self._accelerator, device = accelerator, accelerator.device
        # MPS has no float64; float32 still holds counts and class numbers exactly. The last row says who was stopped.
        self.rows = torch.zeros(samples + 1, len(_COLUMNS), dtype=real_type(device), device=device)
        kept = with_probabilities and samples * classes <= _MOST_PROBABILITIES
        self._probabilities = torch.zeros(samples, classes, device=device) if kept else None

    def add(self, samples: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`samples`, `labels`: (B,); `logits`: (B, classes)."""
        log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        self.rows.index_add_(0, samples, _judge(log_probabilities, labels).to(self.rows.dtype))
        if self._probabilities is not None:
            self._probabilities.index_add_(0, samples, log_probabilities.exp().float())

    def over_all_processes(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows (samples + 1, columns) and probabilities (samples, classes), if they are kept."""
        rows, probabilities = self._sum(self.rows).cpu().double().numpy(), self._probabilities
        return rows, None if probabilities is None else self._sum(probabilities).cpu().numpy()

    def _sum(self, part: Tensor) -> Tensor:
        return self._accelerator.reduce(part, reduction="sum") if self._accelerator.num_processes > 1 else part


def _judge(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """One row per sample, (B, columns)."""
    confidence, prediction = log_probabilities.exp().max(1)
    true = log_probabilities.gather(1, labels.clamp(min=0)[:, None])
    better = (~(log_probabilities <= true)).sum(1)  # so that a network that puts out NaN has no class right
    return torch.stack([torch.ones_like(confidence), labels, -true[:, 0], prediction, confidence, better], 1)


def _summarise(rows: np.ndarray, probabilities: np.ndarray | None, num_classes: int) -> Predictions:
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
        probabilities=None if probabilities is None else probabilities[samples],
    )
