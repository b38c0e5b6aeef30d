"""Every shape against torch's own scheduler, step by step, and the promises torch's schedulers do not make."""

import math
import random

import pytest
import torch
from torch.optim import lr_scheduler

from lockstep.errors import UserError
from lockstep.settings.config import ScheduleConfig
from lockstep.training.progress import Validation
from lockstep.training.schedule import SHAPES, Schedule, build_schedule

LR = 0.1
STEPS_PER_EPOCH = 7
EPOCHS = 12
TOTAL_STEPS = STEPS_PER_EPOCH * EPOCHS


def schedule_of(name: str, **settings: object) -> Schedule:
    return build_schedule(ScheduleConfig(name=name, **settings), LR, STEPS_PER_EPOCH, TOTAL_STEPS)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR, momentum=0.9)


def walk(scheduler: lr_scheduler.LRScheduler, stepped_per_epoch: bool = False) -> list[float]:
    """The learning rates of all updates under one of torch's schedulers."""
    lrs = []
    for step in range(TOTAL_STEPS):
        lrs.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        if not stepped_per_epoch or (step + 1) % STEPS_PER_EPOCH == 0:
            scheduler.step()
    return lrs


def ours(schedule: Schedule) -> list[float]:
    return [schedule.lr_at(step) for step in range(TOTAL_STEPS)]


def test_constant() -> None:
    assert ours(schedule_of("constant")) == [LR] * TOTAL_STEPS


def test_step_as_in_torch() -> None:
    expected = walk(lr_scheduler.StepLR(optimizer(), 3, gamma=0.5), stepped_per_epoch=True)
    assert ours(schedule_of("step", period_epochs=3, gamma=0.5)) == pytest.approx(expected, rel=1e-12)


def test_multistep_as_in_torch() -> None:
    expected = walk(lr_scheduler.MultiStepLR(optimizer(), [2, 5, 6], gamma=0.2), stepped_per_epoch=True)
    assert ours(schedule_of("multistep", milestones=(2, 5, 6), gamma=0.2)) == pytest.approx(expected, rel=1e-12)


def test_exponential_as_in_torch() -> None:
    expected = walk(lr_scheduler.ExponentialLR(optimizer(), gamma=0.9), stepped_per_epoch=True)
    assert ours(schedule_of("exponential", gamma=0.9)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 0.01])
def test_cosine_as_in_torch(min_lr: float) -> None:
    expected = walk(lr_scheduler.CosineAnnealingLR(optimizer(), TOTAL_STEPS, eta_min=min_lr))
    assert ours(schedule_of("cosine", min_lr=min_lr)) == pytest.approx(expected, rel=1e-9)


def test_cosine_restarts_as_in_torch() -> None:
    expected = walk(lr_scheduler.CosineAnnealingWarmRestarts(optimizer(), 3 * STEPS_PER_EPOCH, eta_min=0.01))
    assert ours(schedule_of("cosine_restarts", period_epochs=3, min_lr=0.01)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("period_epochs", [2, 3])  # valleys 14 and 21 steps apart: with and without a step at the peak
def test_cyclic_as_in_torch(period_epochs: int) -> None:
    half = period_epochs * STEPS_PER_EPOCH / 2
    scheduler = lr_scheduler.CyclicLR(optimizer(), 0.01, LR, step_size_up=half, cycle_momentum=False)  # type: ignore
    lrs = ours(schedule_of("cyclic", period_epochs=period_epochs, min_lr=0.01))
    assert lrs == pytest.approx(walk(scheduler), rel=1e-12)


@pytest.mark.parametrize("peak", [0.3, 0.25, 0.01, 0.99])  # at 0.01 the peak lies before the first step
def test_onecycle_as_in_torch(peak: float) -> None:
    expected = walk(lr_scheduler.OneCycleLR(optimizer(), LR, total_steps=TOTAL_STEPS + 1, pct_start=peak))[:-1]
    schedule = build_schedule(ScheduleConfig("onecycle", peak=peak), LR, STEPS_PER_EPOCH, TOTAL_STEPS + 1)
    assert ours(schedule)[:-1] == pytest.approx(expected, rel=1e-9)


def test_onecycle_where_torch_divides_by_zero() -> None:
    schedule = build_schedule(ScheduleConfig("onecycle", peak=0.25), LR, 4, total_steps=4)
    lrs = [schedule.lr_at(step) for step in range(4)]
    assert lrs[0] == LR and lrs[-1] == pytest.approx(LR / 250_000) and sorted(lrs, reverse=True) == lrs


def test_onecycle_ends_are_raised_to_min_lr() -> None:
    lrs = ours(schedule_of("onecycle", min_lr=0.02))
    assert [lrs[0], lrs[-1], min(lrs)] == pytest.approx([0.02] * 3, rel=1e-12)
    assert max(lrs) == pytest.approx(LR, rel=1e-2)


def test_polynomial_as_in_torch() -> None:
    expected = walk(lr_scheduler.PolynomialLR(optimizer(), TOTAL_STEPS, power=0.9))
    assert ours(schedule_of("polynomial", power=0.9)) == pytest.approx(expected, rel=1e-9)


def test_polynomial_ends_at_min_lr() -> None:
    schedule = schedule_of("polynomial", min_lr=0.02, power=2)
    assert schedule.lr_at(TOTAL_STEPS) == 0.02
    assert schedule.lr_at(TOTAL_STEPS // 2) == pytest.approx(0.02 + 0.08 / 4)


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("min_lr", [0.0, 3e-3])
@pytest.mark.parametrize("seed", range(5))
def test_plateau_as_in_torch(seed: int, min_lr: float, patience: int) -> None:
    # A creeping loss beats the threshold every other epoch, coarse ones repeat themselves, a NaN is never better.
    draw = random.Random(seed)
    losses = [9 * (1 - 0.6e-4) ** epoch for epoch in range(6)] + [float(draw.randint(1, 9)) for _ in range(50)]
    losses[9] = math.nan
    theirs = optimizer()
    scheduler = lr_scheduler.ReduceLROnPlateau(theirs, factor=0.3, patience=patience, min_lr=min_lr)
    schedule = schedule_of("plateau", gamma=0.3, patience=patience, min_lr=min_lr)
    validations = [Validation(epoch, loss) for epoch, loss in enumerate(losses, start=1)]
    for epoch, loss in enumerate(losses):
        for step in (epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH - 1):
            assert schedule.lr_at(step, validations[:epoch]) == theirs.param_groups[0]["lr"]
            assert schedule.lr_at(step, validations) == theirs.param_groups[0]["lr"]
        scheduler.step(loss)
    assert theirs.param_groups[0]["lr"] < LR


def test_the_patience_of_a_plateau_counts_epochs_whatever_the_interval_of_validations() -> None:
    schedule = schedule_of("plateau", gamma=0.5, patience=3)
    every_epoch = [Validation(epoch, 1.0) for epoch in range(1, 13)]
    every_second = every_epoch[1::2]
    first_drop = [
        next(step for step in range(TOTAL_STEPS) if schedule.lr_at(step, validations) < LR)
        for validations in (every_epoch, every_second)
    ]
    assert first_drop == [5 * STEPS_PER_EPOCH, 6 * STEPS_PER_EPOCH]


def test_cosine_after_warmup_as_in_torch() -> None:
    warmup_steps = 2 * STEPS_PER_EPOCH
    theirs = optimizer()
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(theirs, 0.01, total_iters=warmup_steps),
        lr_scheduler.CosineAnnealingLR(theirs, TOTAL_STEPS - warmup_steps, eta_min=0.001),
    ]
    expected = walk(lr_scheduler.SequentialLR(theirs, parts, [warmup_steps]))
    assert ours(schedule_of("cosine", warmup_epochs=2, min_lr=0.001)) == pytest.approx(expected, rel=1e-9)


WARMUP_STEPS = round(1.5 * STEPS_PER_EPOCH)
SETTINGS = {"period_epochs": 4, "milestones": (5, 8), "gamma": 0.5, "min_lr": 0.001}


def meant(name: str, settings: dict[str, object]) -> dict[str, object]:
    """Those that mean something to the shape."""
    return {key: value for key, value in settings.items() if key in SHAPES[name].settings | {"warmup_epochs"}}


AFTER_WARMUP = {"cosine", "cosine_restarts", "polynomial", "tanh"}


@pytest.mark.parametrize("name", sorted(set(SHAPES) - AFTER_WARMUP))
def test_warmup_scales_and_borders_stay(name: str) -> None:
    settings = meant(name, SETTINGS)
    plain, warm = schedule_of(name, **settings), schedule_of(name, warmup_epochs=1.5, **settings)
    for step in range(TOTAL_STEPS):
        assert warm.lr_at(step) == pytest.approx(plain.lr_at(step) * min(1, 0.01 + 0.99 * step / WARMUP_STEPS))


@pytest.mark.parametrize("name", sorted(AFTER_WARMUP))
def test_warmup_precedes(name: str) -> None:
    settings: dict = meant(name, SETTINGS)
    warm = schedule_of(name, warmup_epochs=1.5, **settings)
    rest = build_schedule(ScheduleConfig(name, **settings), LR, STEPS_PER_EPOCH, TOTAL_STEPS - WARMUP_STEPS)
    for step in range(WARMUP_STEPS):
        assert warm.lr_at(step) == pytest.approx(LR * (0.01 + 0.99 * step / WARMUP_STEPS))
    for step in range(TOTAL_STEPS - WARMUP_STEPS):
        assert warm.lr_at(WARMUP_STEPS + step) == pytest.approx(rest.lr_at(step))


WARM = {"warmup_epochs": 3, "warmup_lr": 0.002}
# Our settings, timm's name of the shape, and what create_scheduler_v2 takes for the same.
TIMM = {
    "cosine": ({"name": "cosine", **WARM, "warmup_prefix": False, "min_lr": 0.001}, "cosine", {}),
    "cosine-prefix": ({"name": "cosine", **WARM, "min_lr": 0.001}, "cosine", {"warmup_prefix": True}),
    "cosine-k": ({"name": "cosine", "min_lr": 0.001, "k_decay": 1.5}, "cosine", {"warmup_epochs": 0, "k_decay": 1.5}),
    "cycles": (
        {"name": "cosine_restarts", "period_epochs": 2, "period_factor": 1.5, "period_decay": 0.5, "min_lr": 0.001},
        "cosine",
        {"warmup_epochs": 0, "num_epochs": 2, "cycle_mul": 1.5, "cycle_decay": 0.5, "cycle_limit": 99},
    ),
    "cycles-warm": (
        {"name": "cosine_restarts", **WARM, "period_epochs": 4, "period_decay": 0.5, "min_lr": 0.001},
        "cosine",
        {"warmup_prefix": True, "num_epochs": 4, "cycle_decay": 0.5, "cycle_limit": 99},
    ),
    "poly": (
        {"name": "polynomial", **WARM, "warmup_prefix": False, "min_lr": 0.001, "power": 0.7, "k_decay": 2.0},
        "poly",
        {"decay_rate": 0.7, "k_decay": 2.0},
    ),
    "tanh": ({"name": "tanh", **WARM, "min_lr": 0.001}, "tanh", {"warmup_prefix": True}),
    "step": (
        {"name": "step", **WARM, "period_epochs": 4, "gamma": 0.5},
        "step",
        {"decay_epochs": 4, "decay_rate": 0.5},
    ),
    # timm's drop comes an epoch before its milestone
    "multistep": (
        {"name": "multistep", **WARM, "milestones": (4, 7), "gamma": 0.5},
        "multistep",
        {"decay_milestones": [5, 8], "decay_rate": 0.5},
    ),
    "constant": ({"name": "constant", **WARM}, "constant", {}),
}


@pytest.mark.parametrize("per_epoch", [True, False])
@pytest.mark.parametrize("case", TIMM)
def test_the_same_learning_rates_as_timm(case: str, per_epoch: bool) -> None:
    """Over all steps, updated once an epoch, as timm does by default, or at every step; with cooldown."""
    from timm.scheduler import create_scheduler_v2

    settings, name, keywords = TIMM[case]
    if case == "multistep" and not per_epoch:
        pytest.skip("its milestones are then a step early, not an epoch")
    decays = "min_lr" in settings and "cycles" not in case
    cooldown_epochs = 2 if decays else 0
    schedule = schedule_of(**settings, per_epoch=per_epoch, **({"cooldown_epochs": 2} if decays else {}))
    theirs = optimizer()
    epochs = EPOCHS - cooldown_epochs - (3 if keywords.get("warmup_prefix") and "num_epochs" not in keywords else 0)
    arguments = {"warmup_epochs": 3, "warmup_lr": 0.002, "min_lr": 0.001, "num_epochs": epochs, **keywords}
    scheduler, _ = create_scheduler_v2(
        theirs, name, step_on_epochs=per_epoch, updates_per_epoch=STEPS_PER_EPOCH, **arguments
    )
    lrs = []
    for step in range(TOTAL_STEPS):
        if step % STEPS_PER_EPOCH == 0:
            scheduler.step(step // STEPS_PER_EPOCH)
        scheduler.step_update(step)
        lrs.append(theirs.param_groups[0]["lr"])
    assert len(set(lrs)) >= 3, "a flat line proves nothing"
    assert ours(schedule) == pytest.approx(lrs, rel=1e-9, abs=1e-12)


def test_cooldown_stays_at_the_floor() -> None:
    lrs = ours(schedule_of("cosine", cooldown_epochs=1.5, min_lr=0.01))
    assert lrs[-10:] == [0.01] * 10 and lrs[-11] > 0.01, "one and a half epochs of 7 steps are 10"
    shorter = build_schedule(ScheduleConfig("cosine", min_lr=0.01), LR, STEPS_PER_EPOCH, TOTAL_STEPS - 10)
    assert lrs[:-10] == [shorter.lr_at(step) for step in range(TOTAL_STEPS - 10)]
    restarts = ours(schedule_of("cosine_restarts", period_epochs=5, cooldown_epochs=1))
    assert restarts[-7:] == [0.0] * 7 and restarts[-8] > 0


@pytest.mark.parametrize("period_epochs", [0.4, 0.5, 1.3, 2.5])
def test_fractional_periods_change_at_the_rounded_step(period_epochs: float) -> None:
    length = period_epochs * STEPS_PER_EPOCH
    borders = {round(k * length) for k in range(1, TOTAL_STEPS)} & set(range(1, TOTAL_STEPS))
    drops = ours(schedule_of("step", period_epochs=period_epochs, gamma=0.9))
    restarts = ours(schedule_of("cosine_restarts", period_epochs=period_epochs))
    milestones = tuple(k * period_epochs for k in range(1, 200))
    multistep = ours(schedule_of("multistep", milestones=milestones, gamma=0.9))
    steps = range(1, TOTAL_STEPS)
    assert {step for step in steps if drops[step] < drops[step - 1]} == borders
    assert {step for step in steps if multistep[step] < multistep[step - 1]} == borders
    assert {step for step in steps if restarts[step] > restarts[step - 1]} == borders


@pytest.mark.parametrize("name", SHAPES)
def test_jumping_to_a_step_is_walking_there(name: str) -> None:
    validations = [Validation(epoch, 5.0 if epoch == 1 else 4.0) for epoch in range(1, 13)]
    every = {"warmup_epochs": 0.5, "period_epochs": 3, "milestones": (4,), "patience": 1, "min_lr": 1e-4}
    settings = meant(name, every)
    walked = schedule_of(name, **settings)
    lrs = [walked.lr_at(step, validations) for step in range(TOTAL_STEPS)]
    for step in random.Random(0).sample(range(TOTAL_STEPS), TOTAL_STEPS):
        assert schedule_of(name, **settings).lr_at(step, validations) == lrs[step]
    assert all(0 < lr <= LR for lr in lrs) and (len(set(lrs)) > 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosine", "warmup_epochs": 2, "cooldown_epochs": 10}, r"cooldown_epochs=10.0 begins after step 14, "),
        ({"warmup_epochs": 1, "warmup_lr": 0.2}, r"--schedule.warmup_lr=0.2 lies above the learning rate, 0.1"),
        ({"name": "step", "cooldown_epochs": 1}, r"cooldown_epochs=1.0 has no meaning for --schedule.name=step"),
        ({"warmup_epochs": 12}, r"--schedule.warmup_epochs=12.0 is 84 steps, but the whole training has 84"),
        ({"name": "cosine", "min_lr": 0.2}, r"--schedule.min_lr=0.2 lies above --optim.lr=0.1"),
        ({"name": "step", "period_epochs": 0.1}, r"--schedule.period_epochs=0.1 is 0.7 steps \(7 per epoch\)"),
        ({"name": "cyclic", "period_epochs": 0.2}, r"--schedule.name=cyclic needs at least 2"),
        ({"name": "plateau", "gamma": 1}, r"--schedule.gamma=1.0 must be below 1"),
        ({"name": "cosin"}, r"--schedule.name=cosin is not one of constant, .*, tanh\. Did you mean cosine"),
    ],
)
def test_contradictions_are_refused_with_flags_and_numbers(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_schedule(ScheduleConfig(**settings), LR, STEPS_PER_EPOCH, TOTAL_STEPS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SHAPES)
def test_a_training_of_one_step_has_a_learning_rate(name: str) -> None:
    config = ScheduleConfig(name, **meant(name, {"milestones": (1,)}))
    schedule = build_schedule(config, LR, STEPS_PER_EPOCH, total_steps=1)
    assert 0 <= schedule.lr_at(0) <= LR


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("constant", "gamma", 0.5),
        ("cosine", "period_epochs", 3.0),
        ("step", "min_lr", 1e-4),
        ("onecycle", "patience", 1),
    ],
)
def test_a_setting_without_meaning_for_the_shape_is_refused(name: str, setting: str, value: float) -> None:
    config = ScheduleConfig(name=name, **{setting: value})
    with pytest.raises(UserError, match=f"--schedule.{setting}={value} has no meaning for --schedule.name={name}"):
        build_schedule(config, lr=0.1, steps_per_epoch=10, total_steps=100)
