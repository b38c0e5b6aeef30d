"""Sums of loss, hits and samples that survive a restart, and are the same on any number of processes."""

import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep.augment.mix import mix
from lockstep.settings.config import AugmentConfig
from lockstep.training.meter import Meter, means
from lockstep.training.progress import BadSteps, Progress, Sums


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def meter_of(progress: Progress, accelerator: Accelerator, microbatches: int = 1) -> Meter:
    return Meter(progress, range(microbatches), microbatches, accelerator)


def read(meter: Meter, bad: bool = False) -> Progress:
    meter.finish_step(torch.tensor(bad))
    return meter.read(Progress())


def test_sums_of_loss_hits_and_samples(accelerator: Accelerator) -> None:
    meter = meter_of(Progress(), accelerator)
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0]], requires_grad=True)
    meter.add(0, torch.tensor([1.0, 2.0, 4.0], requires_grad=True), logits, torch.tensor([0, 1, 1]))
    assert meter.read(Progress()).window == Sums([0.0]), "counted at the end of the step"
    assert read(meter).window == read(meter).epoch == Sums([7.0], 2, 3, 0)


def test_means_are_over_the_samples_counted() -> None:
    assert means(Sums([7.0], 2, 4, 0)) == {"loss": 1.75, "accuracy": 0.5}
    assert means(Sums([7.0], 2, 4, 3)) == {"loss": 1.75, "accuracy": 0.5, "skipped_images": 3.0}
    assert all(math.isnan(value) for value in means(Sums()).values())


def test_ignored_labels_are_neither_hits_nor_samples_but_counted_apart(accelerator: Accelerator) -> None:
    meter = meter_of(Progress(), accelerator)
    # cross-entropy gives an ignored sample the loss 0, and its logits may favour any class
    meter.add(0, torch.tensor([1.0, 0.0, 0.0]), torch.eye(3), torch.tensor([0, -100, -100]))
    assert read(meter).window == Sums([1.0], 1, 1, 2)


def test_soft_targets_are_hit_at_their_largest_share(accelerator: Accelerator) -> None:
    meter = meter_of(Progress(), accelerator)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.0, 0.6], [0.1, 0.9, 0.0]])
    meter.add(0, torch.ones(3), torch.eye(3), soft)
    assert read(meter).window == Sums([3.0], 1, 3, 0)


def test_a_skipped_image_among_mixed_targets_is_counted_apart(accelerator: Accelerator) -> None:
    meter = meter_of(Progress(), accelerator)
    labels = torch.tensor([1, -100, -100, 2])
    _, soft = mix(torch.rand(4, 3, 8, 8), labels, AugmentConfig(mixup=0.4), 3, seed=(0, 0, 0))
    always_first = torch.eye(3)[torch.zeros(4, dtype=torch.long)]
    meter.add(0, torch.ones(4), always_first, soft)
    assert read(meter).window == Sums([4.0], 0, 2, 2)


def test_a_window_starts_anew_without_the_epoch_and_an_epoch_with_its_window(accelerator: Accelerator) -> None:
    meter = meter_of(Progress(), accelerator)
    meter.add(0, torch.ones(2), torch.eye(2), torch.tensor([0, 0]))
    meter.finish_step(torch.tensor(False))
    meter.start_window()
    assert read(meter).window == Sums([0.0]) and read(meter).epoch == Sums([2.0], 1, 2, 0)
    meter.add(0, torch.ones(2), torch.eye(2), torch.tensor([0, 1]))
    assert read(meter).window == Sums([2.0], 2, 2, 0) and read(meter).epoch == Sums([4.0], 3, 4, 0)
    meter.start_epoch()
    assert read(meter).window == read(meter).epoch == Sums([0.0])


def test_a_bad_step_counts_as_such_and_not_in_the_sums(accelerator: Accelerator) -> None:
    meter = meter_of(Progress(), accelerator)
    good = torch.tensor([2.0]), torch.eye(2)[:1], torch.tensor([0])
    counts = []
    for bad in (True, False, True, True, True, False):
        meter.add(0, *good)
        if bad:
            meter.add(0, torch.tensor([torch.nan]), torch.eye(2)[:1], torch.tensor([0]))
        counts.append(read(meter, bad).bad_steps)
    # In the window, in a row, in all.
    expected = [(1, 1, 1), (1, 0, 1), (2, 1, 2), (3, 2, 3), (4, 3, 4), (4, 0, 4)]
    assert counts == [BadSteps(*numbers) for numbers in expected]
    progress = meter.read(Progress())
    assert progress.window == progress.epoch == Sums([4.0], 2, 2, 0)
    meter.start_window()
    assert meter.read(Progress()).bad_steps == BadSteps(0, 0, 4)


def test_long_sums_of_small_losses_keep_their_digits(accelerator: Accelerator) -> None:
    meter = meter_of(Progress(epoch=Sums([1e7], 0, 10_000_000)), accelerator)
    for _ in range(100):
        meter.add(0, torch.full((1,), 1e-3), torch.eye(2)[:1], torch.tensor([0]))
    assert read(meter).epoch.losses[0] == pytest.approx(1e7 + 0.1, abs=1e-6)  # float32 would stay at 1e7


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 4, (8,), generator=generator)
    labels[number % 8] = -100
    return torch.rand(8, generator=generator), torch.randn(8, 4, generator=generator), labels


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 12))
def test_going_on_from_saved_sums_equals_never_having_stopped(stop: int) -> None:
    accelerator = Accelerator(cpu=True)
    through, interrupted = (meter_of(Progress(), accelerator, 2) for _ in range(2))
    for number in range(12):
        if number == stop:
            interrupted = meter_of(Progress.from_dict(interrupted.read(Progress()).as_dict()), accelerator, 2)
        for meter in (through, interrupted):
            meter.add(number % 2, *batch(number))
            meter.finish_step(torch.tensor(number % 5 > 2))
            if number == 6:
                meter.start_window()
    assert through.read(Progress()) == interrupted.read(Progress()) != Progress()
