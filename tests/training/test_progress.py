"""What the end of a step calls for, which validation is best, and sums that survive a restart."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep.augment.transform import mix
from lockstep.settings.config import AugmentConfig, CheckpointConfig, Config, LogConfig, TrainConfig
from lockstep.training.progress import Calendar, Due, Meter, Progress, Stopwatch, build_calendar, means, train_record

STEPS_PER_EPOCH = 10


def calendar_of(
    *,
    epochs: int = 4,
    max_steps: int | None = None,
    log: int = 50,
    save: int | None = None,
    save_epochs: int = 1,
    histograms: int | None = None,
) -> Calendar:
    config = Config(
        train=TrainConfig(epochs=epochs, max_steps=max_steps, batch_size=32),
        checkpoint=CheckpointConfig(every_steps=save, every_epochs=save_epochs),
        log=LogConfig(every_steps=log, histogram_every_steps=histograms),
    )
    return build_calendar(config, STEPS_PER_EPOCH)


def due_steps(calendar: Calendar, what: str) -> list[int]:
    return [step for step in range(1, calendar.total_steps + 1) if getattr(calendar.after(step), what)]


# ---- Calendar --------------------------------------------------------------------------------------------------------


def test_an_epoch_ends_with_a_log_line_a_validation_and_a_checkpoint() -> None:
    calendar = calendar_of()
    for what in ("log", "validate", "save", "epoch_ends"):
        assert due_steps(calendar, what) == [10, 20, 30, 40]
    assert calendar.after(11) == Due(*[False] * len(Due._fields))


def test_max_steps_ends_training_within_an_epoch_with_everything() -> None:
    calendar = calendar_of(max_steps=25, save_epochs=2)
    assert calendar.total_steps == 25
    due = calendar.after(25)
    assert due.log and due.validate and due.save and due.epoch_ends
    assert due_steps(calendar, "epoch_ends") == [10, 20, 25]
    assert due_steps(calendar, "validate") == due_steps(calendar, "save") == [20, 25]


def test_max_steps_never_lengthens_training() -> None:
    assert calendar_of(epochs=2, max_steps=1000).total_steps == 20


def test_log_lines_come_every_so_many_steps_and_at_epoch_ends() -> None:
    assert due_steps(calendar_of(epochs=2, log=4), "log") == [4, 8, 10, 12, 16, 20]


def test_checkpoints_every_so_many_steps_need_no_validation() -> None:
    calendar = calendar_of(epochs=2, save=7)
    assert due_steps(calendar, "save") == [7, 10, 14, 20]
    assert due_steps(calendar, "validate") == [10, 20]


def test_histograms_come_when_they_are_asked_for_and_otherwise_never() -> None:
    assert due_steps(calendar_of(epochs=2, histograms=6), "histograms") == [6, 12, 18]
    assert due_steps(calendar_of(epochs=2), "histograms") == []


def test_every_second_epoch_and_the_last_are_validated() -> None:
    calendar = calendar_of(epochs=5, save_epochs=2)
    assert due_steps(calendar, "validate") == due_steps(calendar, "save") == [20, 40, 50]
    assert due_steps(calendar, "epoch_ends") == due_steps(calendar, "log") == [10, 20, 30, 40, 50]


def test_places_count_epochs_from_one_and_samples_from_zero() -> None:
    calendar = calendar_of()
    epochs = {step: calendar.epoch_of(step) for step in (0, 1, 10, 11, 20, 40)}
    assert epochs == {0: 1, 1: 1, 10: 1, 11: 2, 20: 2, 40: 4}
    assert calendar.place(12) == {"step": 12, "epoch": 2, "position": 12 * 32}


# ---- The best validation ---------------------------------------------------------------------------------------------


def test_higher_accuracy_is_better_and_of_equals_the_later() -> None:
    progress = Progress()
    results = [(0.9, 0.5), (0.8, 0.5), (2.0, 0.6), (0.1, 0.5), (1.9, 0.6), (2.1, 0.6), (0.1, 0.59)]
    verdicts = []
    for step, (loss, accuracy) in enumerate(results, start=1):
        progress.step = step
        verdicts.append(progress.judge(loss, accuracy))
    assert verdicts == [True, True, True, False, True, True, False]
    assert (progress.best_step, progress.best_accuracy) == (6, 0.6)
    assert progress.val_losses == [loss for loss, _ in results]


def test_even_a_hopeless_first_validation_is_the_best_so_far() -> None:
    progress = Progress(step=1)
    assert progress.judge(math.inf, 0.0) and progress.best_step == 1


def test_training_stalls_after_so_many_validations_without_a_better_one() -> None:
    progress = Progress()
    stalled = []
    for accuracy in (0.5, 0.4, 0.4, 0.6, 0.6, 0.5, 0.5):
        progress.judge(1.0, accuracy)
        stalled.append(progress.has_stalled(3))
    assert stalled == [False, False, False, False, False, False, True]
    assert not progress.has_stalled(None) and not progress.has_stalled(4)


# ---- Sums ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def read(meter: Meter, bad: bool = False) -> Progress:
    meter.finish_step(torch.tensor(bad))
    return meter.read(Progress())


def test_sums_of_loss_hits_and_samples(accelerator: Accelerator) -> None:
    meter = Meter(Progress(), accelerator)
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0]], requires_grad=True)
    meter.add(torch.tensor([1.0, 2.0, 4.0], requires_grad=True), logits, torch.tensor([0, 1, 1]))
    assert meter.read(Progress()).window == [0.0] * 4, "counted at the end of the step"
    assert read(meter).window == read(meter).epoch == [7.0, 2.0, 3.0, 0.0]


def test_means_are_over_the_samples_counted() -> None:
    assert means([7.0, 2.0, 4.0, 0.0]) == {"loss": 1.75, "accuracy": 0.5}
    assert means([7.0, 2.0, 4.0, 3.0]) == {"loss": 1.75, "accuracy": 0.5, "skipped_images": 3.0}
    assert all(math.isnan(value) for value in means([0.0, 0.0, 0.0, 0.0]).values())


def test_ignored_labels_are_neither_hits_nor_samples_but_counted_apart(accelerator: Accelerator) -> None:
    meter = Meter(Progress(), accelerator)
    # cross-entropy gives an ignored sample the loss 0, and its logits may favour any class
    meter.add(torch.tensor([1.0, 0.0, 0.0]), torch.eye(3), torch.tensor([0, -100, -100]))
    assert read(meter).window == [1.0, 1.0, 1.0, 2.0]


def test_soft_targets_are_hit_at_their_largest_share(accelerator: Accelerator) -> None:
    meter = Meter(Progress(), accelerator)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.0, 0.6], [0.1, 0.9, 0.0]])
    meter.add(torch.ones(3), torch.eye(3), soft)
    assert read(meter).window == [3.0, 1.0, 3.0, 0.0]


def test_a_skipped_image_among_mixed_targets_is_counted_apart(accelerator: Accelerator) -> None:
    meter = Meter(Progress(), accelerator)
    labels = torch.tensor([1, -100, -100, 2])
    _, soft = mix(torch.rand(4, 3, 8, 8), labels, AugmentConfig(mixup=0.4), 3, seed=(0, 0, 0))
    always_first = torch.eye(3)[torch.zeros(4, dtype=torch.long)]
    meter.add(torch.ones(4), always_first, soft)
    assert read(meter).window == [4.0, 0.0, 2.0, 2.0]


def test_a_window_starts_anew_without_the_epoch_and_an_epoch_with_its_window(accelerator: Accelerator) -> None:
    meter = Meter(Progress(), accelerator)
    meter.add(torch.ones(2), torch.eye(2), torch.tensor([0, 0]))
    meter.finish_step(torch.tensor(False))
    meter.start_window()
    assert read(meter).window == [0.0] * 4 and read(meter).epoch == [2.0, 1.0, 2.0, 0.0]
    meter.add(torch.ones(2), torch.eye(2), torch.tensor([0, 1]))
    assert read(meter).window == [2.0, 2.0, 2.0, 0.0] and read(meter).epoch == [4.0, 3.0, 4.0, 0.0]
    meter.start_epoch()
    assert read(meter).window == read(meter).epoch == [0.0] * 4


def test_a_bad_step_counts_as_such_and_not_in_the_sums(accelerator: Accelerator) -> None:
    meter = Meter(Progress(), accelerator)
    good = torch.tensor([2.0]), torch.eye(2)[:1], torch.tensor([0])
    counts = []
    for bad in (True, False, True, True, True, False):
        meter.add(*good)
        if bad:
            meter.add(torch.tensor([torch.nan]), torch.eye(2)[:1], torch.tensor([0]))
        counts.append(read(meter, bad).bad)
    # In the window, in a row, in all.
    assert counts == [[1, 1, 1], [1, 0, 1], [2, 1, 2], [3, 2, 3], [4, 3, 4], [4, 0, 4]]
    progress = meter.read(Progress())
    assert progress.window == progress.epoch == [4.0, 2.0, 2.0, 0.0]
    meter.start_window()
    assert meter.read(Progress()).bad == [0, 0, 4]


def test_long_sums_of_small_losses_keep_their_digits(accelerator: Accelerator) -> None:
    meter = Meter(Progress(epoch=[1e7, 0.0, 1e7, 0.0]), accelerator)
    for _ in range(100):
        meter.add(torch.full((1,), 1e-3), torch.eye(2)[:1], torch.tensor([0]))
    assert read(meter).epoch[0] == pytest.approx(1e7 + 0.1, abs=1e-6)  # float32 would stay at 1e7


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 4, (8,), generator=generator)
    labels[number % 8] = -100
    return torch.rand(8, generator=generator), torch.randn(8, 4, generator=generator), labels


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 12))
def test_going_on_from_saved_sums_equals_never_having_stopped(stop: int) -> None:
    accelerator = Accelerator(cpu=True)
    through, interrupted = Meter(Progress(), accelerator), Meter(Progress(), accelerator)
    for number in range(12):
        if number == stop:
            interrupted = Meter(Progress(**interrupted.read(Progress()).as_dict()), accelerator)
        for meter in (through, interrupted):
            meter.add(*batch(number))
            meter.finish_step(torch.tensor(number % 5 > 2))
            if number == 6:
                meter.start_window()
    assert through.read(Progress()) == interrupted.read(Progress()) != Progress()


def test_progress_survives_as_a_dictionary() -> None:
    progress = Progress(step=7, train_seconds=1.5, restarts=2)
    progress.judge(0.3, 0.9)
    assert Progress(**progress.as_dict()) == progress
    assert replace(progress, step=8) != progress
    assert Progress().val_losses is not Progress().val_losses


# ---- Records ---------------------------------------------------------------------------------------------------------


def test_a_train_record_tells_of_bad_steps_only_where_there_were_any() -> None:
    def record(bad: list[int]) -> dict[str, object]:
        return train_record(Progress(step=20, bad=bad), calendar_of(), lr=0.1, grad_norm=2.0, steps_per_second=3.0)

    assert record([2, 0, 5])["bad_steps"] == 2
    assert "bad_steps" not in record([0, 0, 5])


def test_a_train_record_holds_means_place_and_speed() -> None:
    progress = Progress(step=20, window=[6.0, 9.0, 12.0, 0.0])
    record = train_record(progress, calendar_of(), lr=0.1, grad_norm=2.0, steps_per_second=3.0)
    assert record == {
        "step": 20,
        "epoch": 2,
        "position": 640,
        "split": "train",
        "loss": 0.5,
        "accuracy": 0.75,
        "lr": 0.1,
        "grad_norm": 2.0,
        "images_per_second": 96.0,
    }


def test_the_stopwatch_counts_training_and_leaves_out_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lockstep.training.progress.time.perf_counter", lambda: now[0])
    progress = Progress(step=4, train_seconds=5.0)
    stopwatch = Stopwatch(progress)
    progress.step, now[0] = 10, 103.0
    assert stopwatch.lap() == 2.0 and progress.train_seconds == 8.0
    now[0] = 163.0  # a minute of validation
    stopwatch.skip()
    progress.step, now[0] = 12, 164.0
    assert stopwatch.lap() == 2.0 and progress.train_seconds == 9.0
    assert math.isfinite(stopwatch.lap())  # no time, no steps
