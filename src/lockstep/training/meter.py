"""Running sums of what is logged, kept on the device."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from lockstep.errors import UserError
from lockstep.randomness import real_type
from lockstep.training.progress import BadSteps, Progress, Sums
from lockstep.training.tree import tree_sum

_COUNTS = 3  # hits, samples, skipped


class Meter:
    """Sums of loss, hits and samples on the device, and counts of bad steps, so that no step waits for the host.

    In as few operations as can be: each is some microseconds of the host, and a kernel of a GPU, whatever it holds.

    Losses are kept by microbatch, each of which one process computes, and counts are whole numbers: what processes
    add up has no order, and a line of the log is the same on any number of them.
    """

    def __init__(self, progress: Progress, numbers: range, microbatches: int, accelerator: Accelerator) -> None:
        """Goes on from `progress`. `numbers` are those of this process's microbatches among all of a step."""
        dtype = real_type(accelerator.device)
        rows = [_row(sums, numbers, microbatches, accelerator.is_main_process) for sums in _windows(progress)]
        self._sums = torch.tensor(rows, dtype=dtype, device=accelerator.device)
        self._step, self._nothing = torch.zeros_like(self._sums[0]), torch.zeros_like(self._sums[0])
        self._losses, self._counts = self._step[:microbatches].unbind(), self._step[microbatches:]
        bad = progress.bad_steps
        self._bad = torch.tensor([bad.since_log, bad.in_a_row, bad.total], dtype=dtype, device=accelerator.device)
        self._bad_in_a_row = self._bad[1]
        self._microbatches, self._accelerator = microbatches, accelerator

    @torch.no_grad()
    def add(self, number: int, losses: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count microbatch `number`: losses (B,), logits (B, C), targets (B,) or soft (B, C); skipped have none."""
        if targets.ndim == 1:
            counts = torch.stack([logits.argmax(1) == targets, targets >= 0, targets < 0]).sum(1)
        else:
            # Mixing moves parts of targets between rows, so only their sum tells how many images had one.
            labels, used = targets.argmax(1).where(targets.sum(1) > 0, -1), targets.sum().round()
            counts = torch.stack([(logits.argmax(1) == labels).sum(), used, len(labels) - used])
        self._losses[number].add_(losses.sum())
        self._counts.add_(counts)

    def finish_step(self, bad: Tensor) -> None:
        """Count the microbatches added since the last step, or the step as a bad one if the flag on the device is set.

        The flag is the same on all processes.
        """
        self._sums.add_(torch.where(bad, self._nothing, self._step))
        self._step.zero_()
        self._bad.add_(bad)
        self._bad_in_a_row.mul_(bad)  # one good step ends the row

    def read(self, progress: Progress) -> Progress:
        """Put the sums over all processes into `progress`; every process must take part, and waits for the device."""
        sums = self._sums
        if self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums, reduction="sum")
        numbers = torch.cat([sums.flatten(), self._bad]).tolist()
        size = self._microbatches + _COUNTS
        for row, kept in enumerate(_windows(progress)):
            kept.losses = numbers[row * size : row * size + self._microbatches]
            kept.hits, kept.samples, kept.skipped = map(int, numbers[(row + 1) * size - _COUNTS : (row + 1) * size])
        progress.bad_steps = BadSteps(*map(int, numbers[2 * size :]))
        return progress

    def start_window(self) -> None:
        """A log line was written."""
        self._sums[0].zero_()
        self._bad[0] = 0

    def start_epoch(self) -> None:
        """The means of an epoch were written, or it ended without."""
        self._sums.zero_()


def _windows(progress: Progress) -> tuple[Sums, Sums]:
    return progress.window, progress.epoch


def _row(sums: Sums, numbers: range, microbatches: int, is_main: bool) -> list[float]:
    """A process's part of sums over all of them: its own microbatches' losses, and all counts on the main one."""
    losses = sums.losses or [0.0] * microbatches
    if len(losses) != microbatches:
        raise UserError(
            f"the checkpoint cannot be used: its progress.json has sums of {len(losses)} microbatches a step "
            f"instead of {microbatches}"
        )
    own = [loss if number in numbers else 0.0 for number, loss in enumerate(losses)]
    return own + ([sums.hits, sums.samples, sums.skipped] if is_main else [0] * _COUNTS)


def means(sums: Sums) -> dict[str, float]:
    """loss and accuracy, and skipped_images if there were any; without a sample, as where all steps were bad, NaN."""
    count = sums.samples or math.nan
    counted = {"loss": tree_sum(sums.losses) / count, "accuracy": sums.hits / count}
    return {**counted, "skipped_images": sums.skipped} if sums.skipped else counted
