"""What is wrong with a run, if anything: each finding with its evidence and one thing to try.

The rules look at the records of metrics.jsonl, at a probe of the network as training left it, and at what it made of
the test set. A rule is one function of the evidence and one entry in CAUSES, SYMPTOMS or OTHERS. Thresholds leave
sound runs in peace: losses are measured against that of guessing, which validation has at ln(classes), and training
where `train.loss` has it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from lockstep.errors import UserError
from lockstep.evaluation.probe import Probe
from lockstep.files import read_json, write_json
from lockstep.models.network import find_network
from lockstep.run.history import read_history
from lockstep.settings.config import Config

if TYPE_CHECKING:
    from lockstep.evaluation.metrics import Predictions

DIAGNOSIS = "diagnosis.json"


class Finding(NamedTuple):
    """Something that is wrong."""

    sign: str
    evidence: str
    """What shows it: which curve, from which epoch"""
    advice: str
    """One thing to try, as an argument of train.py"""

    def __str__(self) -> str:
        return f"{self.sign}: {self.evidence}; try {self.advice}"


class Doubt(NamedTuple):
    """Samples of a set whose label the network contradicts as surely as it agrees with half of the others.

    Of a sound set hardly any mistake is: CIFAR-10 4 %, digits 0 to 10 %; of digits with every fifth label drawn 42 %.
    """

    samples: int
    mistakes: int
    of: int
    split: str


def doubt_of(predictions: "Predictions", split: str) -> Doubt:
    """The doubt that is left about the labels of a set."""
    right = predictions.predicted == predictions.labels
    usual = sorted(predictions.confidences[right])[int(right.sum()) // 2] if right.any() else math.inf
    sure = predictions.confidences[~right] >= usual
    return Doubt(int(sure.sum()), len(sure), len(right), split)


class Epoch(NamedTuple):
    """Means of training up to a validation, and the validation; without one, means of an epoch's log lines."""

    number: int
    train_loss: float
    train_accuracy: float
    val_loss: float = math.nan
    val_accuracy: float = math.nan


class Levels(NamedTuple):
    """Of the training loss, for a network that says nothing, one that knows how frequent classes are, and the best."""

    blank: float
    """All logits are 0"""
    guessing: float
    lowest: float
    """What label smoothing leaves"""


def levels_of(config: Config, classes: int) -> Levels:
    """Of cross-entropy, and of bce, where each class is a yes or no of its own."""
    train = config.train
    smoothed = train.label_smoothing / classes
    true = 1 - train.label_smoothing + smoothed
    if train.loss != "bce":
        lowest = -true * math.log(true) - (classes - 1) * (smoothed * math.log(smoothed) if smoothed else 0)
        return Levels(math.log(classes), math.log(classes), lowest)
    scale = classes if train.bce_sum else 1
    cut = train.bce_target_threshold is not None
    mixes = config.augment.mixup or config.augment.cutmix
    share = min((2 if cut and mixes else 1) / classes, 0.5)  # of yes: a mixed image may have both classes
    lowest = 0.0 if cut else (_entropy(true) + (classes - 1) * _entropy(smoothed)) / classes
    return Levels(scale * math.log(2), scale * _entropy(share), scale * lowest)


def _entropy(share: float) -> float:
    """Of a yes or no, in nats."""
    return -sum(part * math.log(part) for part in (share, 1 - share) if part > 0)


_LEAST_STEPS = 20
"""Fewer say nothing of a loss that stands still"""
_TRAIN_KEYS = ("epoch", "loss", "accuracy", "lr", "grad_norm")
_VAL_KEYS = ("epoch", "train_loss", "train_accuracy", "loss", "accuracy")


def _has(line: dict[str, Any], keys: Sequence[str]) -> bool:
    """Whether all of these are numbers: others may have written into the file, too."""
    return all(isinstance(line.get(key), int | float) for key in keys)


@dataclass(frozen=True)
class Evidence:
    """What the rules look at."""

    config: Config
    classes: int
    history: Sequence[dict[str, Any]]
    """The records of `read_history`"""
    probe: Probe | None = None
    doubt: Doubt | None = None
    lines: list[dict[str, Any]] = field(init=False)
    """Those of training"""

    def __post_init__(self) -> None:
        lines = [line for line in self.history if line.get("split") == "train" and _has(line, _TRAIN_KEYS)]
        object.__setattr__(self, "lines", lines)

    @cached_property
    def epochs(self) -> list[Epoch]:
        """By validation, or by the epochs of the lines where there is none."""
        validations = [line for line in self.history if line.get("split") == "val" and _has(line, _VAL_KEYS)]
        if validations:
            return [Epoch(*(line[key] for key in _VAL_KEYS)) for line in validations]
        numbers = dict.fromkeys(line["epoch"] for line in self.lines)
        return [Epoch(number, self._mean(number, "loss"), self._mean(number, "accuracy")) for number in numbers]

    def _mean(self, epoch: int, key: str) -> float:
        values = [line[key] for line in self.lines if line["epoch"] == epoch]
        return sum(values) / len(values)

    @cached_property
    def levels(self) -> Levels:
        """Of the training loss."""
        return levels_of(self.config, self.classes)

    @property
    def guessing(self) -> float:
        """The training loss of one who guesses."""
        return self.levels.guessing

    @property
    def val_guessing(self) -> float:
        """The validation loss of one who guesses: always cross-entropy."""
        return math.log(self.classes)

    @property
    def is_short(self) -> bool:
        """Whether a loss had hardly the steps to move."""
        return max((line["step"] for line in self.lines if "step" in line), default=_LEAST_STEPS) < _LEAST_STEPS

    @property
    def still_falls(self) -> bool:
        """Whether the training loss may yet come down from a high start: the last epoch made it clearly lower.

        Of one epoch with loaded weights nothing is known: a head may have been drawn to them.
        """
        *before, last = (epoch.train_loss for epoch in self.epochs)
        if not before and (self.config.model.pretrained or self.config.model.checkpoint or self.config.run.from_run):
            return True
        return last < 0.9 * (before[-1] if before else self.levels.blank)

    @property
    def learns_little(self) -> bool:
        """Whether the training loss ended nearer to guessing than to none, though it had the steps."""
        return not (self.left_to_learn < 0.5 or self.is_short)

    @property
    def left_to_learn(self) -> float:
        """The last training loss between the lowest that label smoothing leaves, 0, and that of guessing, 1."""
        return (self.epochs[-1].train_loss - self.levels.lowest) / (self.guessing - self.levels.lowest)

    @property
    def mixes(self) -> bool:
        """Whether training accuracy says little, because labels are mixed."""
        return bool(self.config.augment.mixup or self.config.augment.cutmix)

    @property
    def course(self) -> str:
        """Of the training loss, in words."""
        first, last = self.epochs[0], self.epochs[-1]
        return (
            f"train/loss goes from {first.train_loss:.3g} in epoch {first.number} to {last.train_loss:.3g} in epoch "
            f"{last.number} (guessing: {self.guessing:.3g})"
        )

    def scaled_lr(self, factor: float) -> str:
        return f"--optim.lr={self.config.optim.lr * factor:.3g}"


def diagnose(evidence: Evidence) -> list[Finding]:
    """All findings, causes first; empty when all is well, or when there is no epoch to judge by."""
    if not evidence.epochs:
        return []
    causes = _found(CAUSES, evidence)
    return causes + ([] if causes else _found(SYMPTOMS, evidence)[:1]) + _found(OTHERS, evidence)


def write_diagnosis(run_dir: Path, evidence: Evidence) -> list[Finding]:
    """Diagnose, and leave the findings and what cannot be read off the history in `diagnosis.json`."""
    findings = diagnose(evidence)
    kept = {
        "findings": [finding._asdict() for finding in findings],
        "classes": evidence.classes,
        "probe": asdict(evidence.probe) if evidence.probe else None,
        "doubt": evidence.doubt._asdict() if evidence.doubt else None,
    }
    write_json(run_dir / DIAGNOSIS, kept)
    return findings


def read_evidence(run_dir: Path, config: Config) -> Evidence | None:
    """What a finished run was diagnosed by; None if there is no such file, or none that can be read."""
    try:
        kept = read_json(run_dir / DIAGNOSIS)
        probe = _as_probe(**kept["probe"]) if kept["probe"] else None
        doubt = Doubt(**kept["doubt"]) if kept["doubt"] else None
        return Evidence(config, int(kept["classes"]), read_history(run_dir), probe, doubt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _as_probe(
    *, images: int, accuracy: float, silent: dict[str, float], gradients: dict[str, float], moved: float | None
) -> Probe:
    """Of `asdict`, by way of JSON, in which NaN is a text."""
    silent, gradients = ({name: float(value) for name, value in kept.items()} for kept in (silent, gradients))
    return Probe(images, float(accuracy), silent, gradients, None if moved is None else float(moved))


def _found(rules: Sequence["Rule"], evidence: Evidence) -> list[Finding]:
    return [finding for rule in rules if (finding := rule(evidence))]


Rule = Callable[[Evidence], Finding | None]


def _exploding_gradients(e: Evidence) -> Finding | None:
    bad = [line for line in e.lines if line.get("bad_steps")]
    norms = [line["grad_norm"] for line in e.lines if math.isfinite(line["grad_norm"])]
    lost = next((epoch.number for epoch in e.epochs if not math.isfinite(epoch.train_loss)), None)
    advice = "--optim.clip_norm=1" if e.config.optim.clip_norm is None else e.scaled_lr(0.1)
    if bad:
        count = sum(line["bad_steps"] for line in bad)
        where = f"{count} steps without a finite loss or gradient, from epoch {bad[0]['epoch']} on (train/bad_steps)"
        return Finding("exploding gradients", where, advice)
    if lost is not None:
        return Finding("exploding gradients", f"train/loss is not finite from epoch {lost} on", advice)
    if norms and max(norms) > 1000 * max(median(norms), 1.0):
        epoch = next(line["epoch"] for line in e.lines if line["grad_norm"] == max(norms))
        where = f"train/grad_norm is {max(norms):.3g} in epoch {epoch}; half of the lines are up to {median(norms):.3g}"
        return Finding("exploding gradients", where, advice)
    return None


def _vanishing_gradients(e: Evidence) -> Finding | None:
    if e.probe is None or len(e.probe.gradients) < 2 or not e.learns_little:
        return None
    (first, low), *_, (last, high) = e.probe.gradients.items()
    if not low < 1e-3 * high or _silent_layer(e):  # what passes no dead layer has not vanished
        return None
    where = f"the gradient of {first} is {low / high if high else 0:.1g} times that of {last}, and {e.course}"
    has = _settings_of(e.config)
    if "batch_norm" in has and not e.config.model.batch_norm:
        return Finding("vanishing gradients", where, "--model.batch_norm=true")
    starts_otherwise = "init" in has and e.config.model.init != "kaiming_normal"
    advice = "--model.init=kaiming_normal" if starts_otherwise else "--model.name=timm/resnet18"
    return Finding("vanishing gradients", where, advice)


def _settings_of(config: Config) -> frozenset[str]:
    """The settings of the section `model` that mean something to the network."""
    try:
        return find_network(config.model).settings
    except UserError:  # one that somebody has registered elsewhere
        return frozenset()


def _silent_layer(e: Evidence) -> str | None:
    """The ReLU of most silent channels, if nearly all of its are."""
    worst = max(e.probe.silent, key=e.probe.silent.__getitem__, default=None) if e.probe else None
    return worst if worst is not None and e.probe and e.probe.silent[worst] >= 0.9 else None


def _dead_relus(e: Evidence) -> Finding | None:
    layer = _silent_layer(e)
    if layer is None or e.probe is None or not e.learns_little:
        return None
    share = (
        f"{e.probe.silent[layer]:.0%} of the channels behind {layer} (ReLU) are zero for all of {e.probe.images} images"
    )
    return Finding("dead ReLUs", f"{share}, and {e.course}", e.scaled_lr(0.1))


def _rate_too_high(e: Evidence) -> Finding | None:
    if e.probe and e.probe.moved is not None and e.probe.moved < 0.5:
        return None
    losses = [epoch.train_loss for epoch in e.epochs]
    end = min(losses[-max(len(losses) // 3, 1) :])  # one bad epoch is no rise
    best = min(range(len(losses)), key=losses.__getitem__)
    blank, first = e.levels.blank, e.epochs[0]
    pairs = zip(e.epochs, e.epochs[1:], strict=False)  # one that falls from a high start, of a drawn head, is no sign
    above = next((now for old, now in pairs if now.train_loss > max(1.25 * blank, old.train_loss)), None)
    if above:
        where = f"train/loss is {above.train_loss:.3g} in epoch {above.number}, above {blank:.3g}, that of guessing"
    elif end > (1.15 if e.learns_little else 1.5) * losses[best] and end - losses[best] > 0.1 * e.guessing:
        where = (
            f"train/loss rises from {losses[best]:.3g} in epoch {e.epochs[best].number} to {losses[-1]:.3g} at the end"
        )
    elif e.learns_little and losses[0] > 2 * blank and not e.still_falls:
        where = f"train/loss is {losses[0]:.3g} in epoch {first.number}, above {blank:.3g}, that of guessing"
    else:
        return None
    return Finding("learning rate too high", where, e.scaled_lr(0.1))


def _rate_too_low(e: Evidence) -> Finding | None:
    moved = e.probe.moved if e.probe else None
    if moved is None or not moved <= 0.02 or not e.learns_little:
        return None
    where = f"the weights moved by {moved:.1%} of their size in all of training, and {e.course}"
    return Finding("learning rate too low", where, e.scaled_lr(10))


def _unrelated_labels(e: Evidence) -> Finding | None:
    if e.doubt is None or e.probe is None:
        return None
    right, guessed, last = 1 - e.doubt.mistakes / e.doubt.of, 1 / e.classes, e.epochs[-1]
    chance = 2 * math.sqrt(guessed * (1 - guessed) / e.doubt.of)
    # Running statistics of a short training fit no image: then the network does not know those it was trained on.
    if chance > 0.1 or right > guessed + chance or e.probe.accuracy < right + 0.25:
        return None
    where = (
        f"{e.doubt.split}/accuracy is {right:.1%}, that of guessing, after {last.number} epochs, and that of training "
        f"images {e.probe.accuracy:.1%}: the network learns labels by heart that do not follow from the images"
    )
    return Finding("labels that do not fit", where, "another --data.source, whose labels fit its images")


def _loss_not_falling(e: Evidence) -> Finding | None:
    if e.epochs[-1].train_loss < 0.95 * e.guessing or e.still_falls or e.is_short:
        return None
    advice = e.scaled_lr(0.1) if e.probe and (e.probe.moved or 0) > 1 else e.scaled_lr(10)
    return Finding("loss does not fall", e.course, f"{advice}, and look at some images: do their labels fit?")


def _oscillation(e: Evidence) -> Finding | None:
    second_half = e.epochs[len(e.epochs) // 2 :]
    losses = [epoch.train_loss for epoch in second_half]
    rises = [now for before, now in zip(losses, losses[1:], strict=False) if now > 1.1 * before + 0.01 * e.guessing]
    if len(losses) < 4 or len(rises) < (len(losses) - 1) / 3:
        return None
    where = f"train/loss goes up {len(rises)} times in the {len(losses)} epochs from epoch {second_half[0].number} on"
    return Finding("oscillating loss", where, e.scaled_lr(0.3))


def _underfitting(e: Evidence) -> Finding | None:
    third = e.epochs[-max(len(e.epochs) // 3, 2) :]
    last, lowest = e.epochs[-1], min(epoch.train_loss for epoch in third)
    levels = [e.left_to_learn] + ([] if math.isnan(last.val_loss) else [last.val_loss / e.val_guessing])
    apart = (last.val_loss / e.val_guessing) / max(last.train_loss / e.guessing, 1e-9)
    flat = lowest > 0.97 * third[0].train_loss and not apart > 1.3
    rates = [line["lr"] for line in e.lines if line["epoch"] >= third[0].number]
    still_learns = max(rates, default=0.0) >= 0.1 * e.config.lr
    if len(e.epochs) < 4 or min(levels) < 0.4 or not flat or not still_learns:
        return None
    where = f"train/loss does not fall below {lowest:.2f} from epoch {third[0].number} on, {_both(last)}"
    return Finding("underfitting", where, _more_capacity(e.config))


def _both(last: Epoch) -> str:
    return "with no validation" if math.isnan(last.val_loss) else f"and val/loss is no lower ({last.val_loss:.2f})"


def _more_capacity(config: Config) -> str:
    if config.optim.weight_decay > 1e-3 or config.optim.l1:
        return "--optim.weight_decay=0" if config.optim.weight_decay else "--optim.l1=0"
    if config.model.dropout and "dropout" in _settings_of(config):
        return "--model.dropout=0"
    return "--model.name=timm/resnet50" if config.model.name.startswith("timm/") else "--model.name=timm/resnet18"


def _overfitting(e: Evidence) -> Finding | None:
    measured = [epoch for epoch in e.epochs if math.isfinite(epoch.val_loss)]
    if len(measured) < 3 or _unrelated_labels(e):
        return None
    best, last = min(measured, key=lambda epoch: epoch.val_loss), measured[-1]
    end = measured[-max(len(measured) // 3, 1) :]  # of few steps, an epoch's means jump
    gap = mean(epoch.train_accuracy - epoch.val_accuracy for epoch in end)
    train, val = (mean(getattr(epoch, key) for epoch in end) for key in ("train_loss", "val_loss"))
    apart = (val / e.val_guessing) / max(train / e.guessing, 1e-9)
    rises = last.val_loss > 1.3 * best.val_loss and last.val_loss - best.val_loss > 0.05 * e.val_guessing
    if rises and last.train_loss < 0.8 * best.train_loss and gap > 0.02:
        where = (
            f"val/loss is lowest in epoch {best.number} ({best.val_loss:.3g}) and {last.val_loss:.3g} at the end, "
            f"while train/loss falls from {best.train_loss:.3g} to {last.train_loss:.3g}"
        )
    elif gap > 0.08 and (apart > 1.5 or gap > 0.2) and not e.mixes:
        shares = [mean(getattr(epoch, key) for epoch in end) for key in ("train_accuracy", "val_accuracy")]
        where = f"train/accuracy is {shares[0]:.1%} from epoch {end[0].number} on, and val/accuracy {shares[1]:.1%}"
    else:
        return None
    return Finding("overfitting", where, _regularization(e.config))


def _regularization(config: Config) -> str:
    """The usual remedy that the run does not use yet."""
    augment = config.augment
    if not (augment.crop_padding or augment.translate or augment.resized_crop):
        return "--augment.translate=0.1"
    if not config.optim.weight_decay:
        return "--optim.weight_decay=0.0005"
    if not config.train.label_smoothing:
        return "--train.label_smoothing=0.1"
    return "--train.early_stop_epochs=5"


def _starving_device(e: Evidence) -> Finding | None:
    shares = [line["data_share"] for line in e.lines[1:] if "data_share" in line]
    if not shares or median(shares) < 0.3:
        return None
    advice = "--data.workers=-1" if e.config.data.workers == 0 else "--data.memory_budget=8, if that much is free"
    where = f"{median(shares):.0%} of the time goes into bringing images (train/data_share)"
    return Finding("starving device", where, advice)


def _doubtful_labels(e: Evidence) -> Finding | None:
    doubt = e.doubt
    # A network that is wrong more often, measured by one that guesses, has no opinion that counts.
    if doubt is None or doubt.mistakes > 0.4 * doubt.of * (1 - 1 / e.classes) or e.is_short:
        return None
    if doubt.samples < max(5, 0.02 * doubt.of, 0.25 * doubt.mistakes):
        return None
    where = (
        f"for {doubt.samples} of {doubt.of} {doubt.split} images the network is as sure of another class as it is of "
        "right ones"
    )
    return Finding("labels that look wrong", where, "--train.label_smoothing=0.1, or mend them")


CAUSES: tuple[Rule, ...] = (
    _exploding_gradients, _dead_relus, _vanishing_gradients, _rate_too_high, _rate_too_low, _unrelated_labels,
    _doubtful_labels,
)  # fmt: skip
SYMPTOMS: tuple[Rule, ...] = (_loss_not_falling, _oscillation, _underfitting)
"""The first is told, where no cause is found"""
OTHERS: tuple[Rule, ...] = (_overfitting, _starving_device)
