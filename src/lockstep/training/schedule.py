"""The learning rate as a pure function of the step.

Nothing is stepped and nothing is saved: a resumed run asks for the learning rate of its next step and gets it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lockstep.errors import UserError
from lockstep.settings.config import ScheduleConfig
from lockstep.settings.registry import choose
from lockstep.training.progress import Validation

WARMUP_START = 0.01
"""Share of the learning rate at which a warm-up begins."""

# torch's defaults for ReduceLROnPlateau (threshold, eps) and OneCycleLR (div_factor, final_div_factor).
_PLATEAU_THRESHOLD = 1e-4
_PLATEAU_SMALLEST_DROP = 1e-8
_ONECYCLE_DIV = 25.0
_ONECYCLE_FINAL_DIV = 1e4
_TANH_BEGIN, _TANH_END = -7.0, 3.0  # timm's


@dataclass(frozen=True)
class Schedule:
    """A learning rate for every step; `build_schedule` makes it and checks the settings against each other.

    Lengths in epochs become steps by rounding, so they may be fractions: half an epoch of 25 steps is 12.

    - `constant`, and `step`, `multistep`, `exponential`, `plateau`, which change at the end of an epoch: torch's shapes
      of these names, stepped per epoch. Warm-up scales them; their borders stay at the epochs that were asked for.
    - `cosine`, `cosine_restarts`, `polynomial`, `tanh` fall a little every step and start when warm-up is over, or with
      `warmup_prefix=False` at step 0, hidden by warm-up at first. All but `cosine_restarts` take all steps up to
      cooldown, the last `cooldown_epochs` at `min_lr`; without any they would reach it one step after the last.
    - `cyclic`: torch's CyclicLR (triangular) from a valley at `min_lr` (torch: `base_lr`) up to `lr` (`max_lr`) and
      back, `period_epochs` for both ways. `onecycle`: torch's OneCycleLR, whose end points `lr / 25` and `lr / 250000`
      are raised to `min_lr`. Both count from step 0, warm-up scales them, and they leave momentum alone, unlike torch.

    While warm-up lasts the learning rate may lie below `min_lr`. With `per_epoch` each step has the learning rate of
    the first one of its epoch. timm's schedulers, of the same parameters, give the same learning rates.
    """

    config: ScheduleConfig
    lr: float
    steps_per_epoch: int
    total_steps: int

    @property
    def warmup_steps(self) -> int:
        """Steps with a reduced learning rate; the one after them is the first with the full one."""
        return round(self.config.warmup_epochs * self.steps_per_epoch)

    @property
    def first_step(self) -> int:
        """Where a shape that waits for warm-up begins."""
        return self.warmup_steps if self.config.warmup_prefix else 0

    @property
    def cooldown_step(self) -> int:
        """The first step of cooldown; without any, one after the last."""
        return self.total_steps - round(self.config.cooldown_epochs * self.steps_per_epoch)

    @property
    def period_steps(self) -> float:
        """Steps of one period, not rounded: the borders of the periods are, so that errors do not add up."""
        return self.config.period_epochs * self.steps_per_epoch

    def lr_at(self, step: int, validations: Sequence[Validation] = ()) -> float:
        """The learning rate of the update that `step` updates precede (the first has `step` 0).

        Only `plateau` reads `validations`, oldest first. Those of epochs that end after `step` are left out, so a whole
        run's give any step's learning rate.
        """
        assert step >= 0, step
        if self.config.per_epoch:
            step -= step % self.steps_per_epoch
        return SHAPES[self.config.name].lr(self, step, validations) * self._warmup(step)

    def _warmup(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        start = WARMUP_START if self.config.warmup_lr is None else self.config.warmup_lr / self.lr
        return start + (1 - start) * step / self.warmup_steps


def build_schedule(config: ScheduleConfig, lr: float, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The schedule of `config` for a training of `total_steps` updates with the highest learning rate `lr`.

    Raises UserError for an unknown name, for settings that have no meaning for it, and for those that contradict each
    other or the length of the training:
    a warm-up that leaves no step, a floor above `lr`, a period too short to have a shape, a plateau that never drops.
    """
    assert lr > 0 and steps_per_epoch > 0 and total_steps > 0, (lr, steps_per_epoch, total_steps)
    shape = choose(SHAPES, "schedule.name", config)
    schedule = Schedule(config, lr, steps_per_epoch, total_steps)
    _require_room(schedule)
    if shape.has_floor and config.min_lr > lr:
        raise UserError(f"--schedule.min_lr={config.min_lr} lies above --optim.lr={lr}: lower one or raise the other")
    if schedule.period_steps < shape.shortest_period_steps:
        raise UserError(
            f"--schedule.period_epochs={config.period_epochs} is {schedule.period_steps:.3g} steps "
            f"({steps_per_epoch} per epoch), but --schedule.name={config.name} needs at least "
            f"{shape.shortest_period_steps}: raise it"
        )
    if config.name == "plateau" and config.gamma >= 1:
        raise UserError(f"--schedule.gamma={config.gamma} must be below 1 for --schedule.name=plateau")
    return schedule


def keeps_course(config: ScheduleConfig, epochs: int, more_epochs: int) -> bool:
    """Whether the learning rates of so many epochs stay what they were when the training gets longer."""
    if config.cooldown_epochs:
        return False
    steps = 100  # of an epoch: any number shows it
    short, long = (Schedule(config, 1.0, steps, number * steps) for number in (epochs, more_epochs))
    return all(short.lr_at(step) == long.lr_at(step) for step in range(short.total_steps))


def _require_room(schedule: Schedule) -> None:
    """Raise UserError if warm-up and cooldown leave no step between them, or if warm-up begins above its end."""
    config, total_steps = schedule.config, schedule.total_steps
    if schedule.warmup_steps >= total_steps:
        raise UserError(
            f"--schedule.warmup_epochs={config.warmup_epochs} is {schedule.warmup_steps} steps, but the whole training "
            f"has {total_steps}: shorten the warm-up, or raise --train.epochs (or --train.max_steps)"
        )
    if schedule.warmup_steps >= schedule.cooldown_step:
        raise UserError(
            f"--schedule.cooldown_epochs={config.cooldown_epochs} begins after step {schedule.cooldown_step}, but "
            f"warm-up has {schedule.warmup_steps} steps: shorten one of them, or raise --train.epochs"
        )
    if config.warmup_lr is not None and config.warmup_lr > schedule.lr:
        raise UserError(f"--schedule.warmup_lr={config.warmup_lr} lies above the learning rate, {schedule.lr:g}")


Validations = Sequence[Validation]


def _constant(schedule: Schedule, step: int, validations: Validations) -> float:
    return schedule.lr


def _step(schedule: Schedule, step: int, validations: Validations) -> float:
    drops, _ = _period_and_phase(step, schedule.period_steps)
    return schedule.lr * schedule.config.gamma**drops


def _multistep(schedule: Schedule, step: int, validations: Validations) -> float:
    borders = [round(milestone * schedule.steps_per_epoch) for milestone in schedule.config.milestones]
    return schedule.lr * schedule.config.gamma ** sum(border <= step for border in borders)


def _exponential(schedule: Schedule, step: int, validations: Validations) -> float:
    return schedule.lr * schedule.config.gamma ** (step // schedule.steps_per_epoch)


def _cosine(schedule: Schedule, step: int, validations: Validations) -> float:
    """Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983; k-decay: https://arxiv.org/abs/2004.05909."""
    share = _share_after_warmup(schedule, step) ** schedule.config.k_decay
    return _cosine_between(schedule.lr, schedule.config.min_lr, share)


def _cosine_restarts(schedule: Schedule, step: int, validations: Validations) -> float:
    config, done = schedule.config, 0 if step < schedule.warmup_steps else step - schedule.first_step
    if step >= schedule.cooldown_step:
        return config.min_lr
    if config.period_factor == 1:
        period, phase = _period_and_phase(done, schedule.period_steps)
    else:
        period, phase = _growing_period_and_phase(done, schedule.period_steps, config.period_factor)
    highest = max(schedule.lr * config.period_decay**period, config.min_lr)
    return _cosine_between(highest, config.min_lr, phase**config.k_decay)


def _polynomial(schedule: Schedule, step: int, validations: Validations) -> float:
    floor, share = schedule.config.min_lr, _share_after_warmup(schedule, step) ** schedule.config.k_decay
    return floor + (schedule.lr - floor) * (1 - share) ** schedule.config.power


def _tanh(schedule: Schedule, step: int, validations: Validations) -> float:
    """Hsueh et al. 2019, https://arxiv.org/abs/1806.01593: high for long, then a steep fall; the bounds are timm's."""
    share = _share_after_warmup(schedule, step)
    if step < schedule.warmup_steps or share == 1:  # the curve itself comes near both ends, and no further
        return schedule.config.min_lr if share else schedule.lr
    height = (1 - math.tanh(_TANH_BEGIN * (1 - share) + _TANH_END * share)) / 2
    return schedule.config.min_lr + (schedule.lr - schedule.config.min_lr) * height


def _cyclic(schedule: Schedule, step: int, validations: Validations) -> float:
    _, phase = _period_and_phase(step, schedule.period_steps)
    height = 1 - abs(1 - 2 * phase)
    return schedule.config.min_lr + (schedule.lr - schedule.config.min_lr) * height


def _onecycle(schedule: Schedule, step: int, validations: Validations) -> float:
    """Two half cosines, up then down (Smith and Topin 2017, https://arxiv.org/abs/1708.07120, in torch's shape)."""
    first = schedule.lr / _ONECYCLE_DIV
    final = max(first / _ONECYCLE_FINAL_DIV, schedule.config.min_lr)
    last_step = schedule.total_steps - 1
    peak_step = schedule.config.peak * schedule.total_steps - 1
    if step < peak_step:
        return _cosine_between(max(first, schedule.config.min_lr), schedule.lr, step / peak_step)
    return _cosine_between(schedule.lr, final, (min(step, last_step) - peak_step) / (last_step - peak_step))


def _plateau(schedule: Schedule, step: int, validations: Validations) -> float:
    """torch's ReduceLROnPlateau, replayed over all validations so far; its patience counts epochs."""
    lr, best, since = schedule.lr, math.inf, 0
    for epoch, loss in validations:
        if epoch * schedule.steps_per_epoch > step:
            break
        if loss < best * (1 - _PLATEAU_THRESHOLD):  # false for a NaN too, which therefore is no improvement
            best, since = loss, epoch
        elif epoch - since > schedule.config.patience:
            since = epoch
            lower = max(lr * schedule.config.gamma, schedule.config.min_lr)
            if lr - lower > _PLATEAU_SMALLEST_DROP:
                lr = lower
    return lr


class Shape(NamedTuple):
    """A learning rate without warm-up, for a schedule, a step and the validations until then; and what it needs."""

    lr: Callable[[Schedule, int, Validations], float]
    settings: frozenset[str] = frozenset()
    """Settings of the section that it uses, beside warmup_epochs, warmup_lr and per_epoch"""
    shortest_period_steps: int = 0

    @property
    def has_floor(self) -> bool:
        """Whether schedule.min_lr counts."""
        return "min_lr" in self.settings


_ENDS = frozenset({"min_lr", "warmup_prefix", "cooldown_epochs"})
_RESTARTS = frozenset({"period_epochs", "period_factor", "period_decay"})

SHAPES = {
    "constant": Shape(_constant),
    "step": Shape(_step, frozenset({"period_epochs", "gamma"}), shortest_period_steps=1),
    "multistep": Shape(_multistep, frozenset({"milestones", "gamma"})),
    "exponential": Shape(_exponential, frozenset({"gamma"})),
    "cosine": Shape(_cosine, _ENDS | {"k_decay"}),
    "plateau": Shape(_plateau, frozenset({"min_lr", "gamma", "patience"})),
    "cosine_restarts": Shape(_cosine_restarts, _ENDS | _RESTARTS | {"k_decay"}, shortest_period_steps=2),
    "cyclic": Shape(_cyclic, frozenset({"min_lr", "period_epochs"}), shortest_period_steps=2),
    "onecycle": Shape(_onecycle, frozenset({"min_lr", "peak"})),
    "polynomial": Shape(_polynomial, _ENDS | {"power", "k_decay"}),
    "tanh": Shape(_tanh, _ENDS),
}


def _share_after_warmup(schedule: Schedule, step: int) -> float:
    """How much of the training between warm-up and cooldown is done, in [0, 1]; 0 while warm-up lasts."""
    if step < schedule.warmup_steps:
        return 0.0
    return min(1.0, (step - schedule.first_step) / (schedule.cooldown_step - schedule.first_step))


def _period_and_phase(step: int, period_steps: float) -> tuple[int, float]:
    """Which period `step` lies in, and where: 0 at its beginning, towards 1 at its end.

    Period k begins at step round(k * period_steps), which also makes this safe from lengths such as
    0.1 * 30 = 3.0000000000000004. The phase is clipped, as that shifts the beginning by up to half a step.
    """
    period = int((step + 0.5) / period_steps)
    if round(period * period_steps) > step:
        period -= 1
    return period, min(1.0, max(0.0, step / period_steps - period))


def _growing_period_and_phase(step: int, period_steps: float, factor: float) -> tuple[int, float]:
    """The same where each period is `factor` times as long as the one before it; each begins at a whole step."""
    period, begin, length = 0, 0.0, period_steps
    while step > begin + length - 1e-6:
        period, begin, length = period + 1, begin + length, length * factor
    return period, min(1.0, max(0.0, (step - begin) / length))


def _cosine_between(start: float, end: float, share: float) -> float:
    """Half a cosine wave from `start` at share 0 to `end` at share 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
