"""A look at a training that has not begun: its first batch, labels, duplicates, learning rate; as text and pictures."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.augment.transform import build_transform
from lockstep.data.duplicates import Duplicates, Place, find_duplicates
from lockstep.data.images import Data, ImageSet
from lockstep.data.loader import TrainLoader, crops_while_decoding
from lockstep.data.sampler import Sampler, build_sampler, resolve_micro_batch_size
from lockstep.data.sources.source import spread
from lockstep.files import write_json
from lockstep.launch.accelerator import Launch
from lockstep.report.drawing import Drawing, drawn_beside
from lockstep.report.figures import plot_samples
from lockstep.report.predictions import class_names, pixels
from lockstep.report.preview_figures import plot_label_counts, plot_learning_rate
from lockstep.report.run_figures import drawings_of_training_set
from lockstep.settings.config import Config
from lockstep.training.calendar import build_calendar
from lockstep.training.schedule import build_schedule

_MOST_RATES = 5000
_MOST_PAIRS = 12
_MOST_NAMED = 5


@dataclass(frozen=True)
class Values:
    """What a batch of images consists of."""

    dtype: str
    shape: tuple[int, ...]
    lowest: float
    highest: float
    mean: tuple[float, ...]
    """Per channel"""
    std: tuple[float, ...]

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"{self.dtype} {size}, {self.lowest:.3g} to {self.highest:.3g}, mean {mean}, deviation {std}"


@dataclass(frozen=True)
class Preview:
    """What there is to know before a training."""

    before: Values
    """The first microbatch as it is decoded, in [0, 1]"""
    after: Values
    """The same as the network gets it: augmented, normalised"""
    targets: str
    counts: dict[str, np.ndarray]
    """By split, images of each class, int (classes,)"""
    duplicates: Duplicates
    micro_batch_size: int
    steps_per_epoch: int
    total_steps: int
    rates: tuple[tuple[int, float], ...]
    """Step and learning rate, 5,000 at most, spread over all steps"""


def look(config: Config, data: Data) -> Preview:
    """Look at everything; trains nothing, on the CPU. Raises UserError for what a training would refuse there."""
    micro_batch_size = resolve_micro_batch_size(config, 1)
    sampler = build_sampler(config, data.train.drawn_labels, micro_batch_size)
    calendar = build_calendar(config, sampler.steps_per_epoch, has_validation=data.val is not None)
    schedule = build_schedule(config.schedule, config.lr, sampler.steps_per_epoch, calendar.planned_steps)
    before, after, targets = _first_batch(config, data, sampler)
    return Preview(
        before,
        after,
        targets,
        {name: _label_counts(images, data.num_classes) for name, images in sets_of(data).items()},
        find_duplicates(data),
        micro_batch_size,
        sampler.steps_per_epoch,
        calendar.total_steps,
        tuple((step, schedule.lr_at(step)) for step in spread(calendar.total_steps, _MOST_RATES)),
    )


def sets_of(data: Data) -> dict[str, ImageSet]:
    """Those that there are, by name."""
    sets = {"train": data.train, "val": data.val, "test": data.test}
    return {name: images for name, images in sets.items() if images is not None}


def _label_counts(images: ImageSet, classes: int) -> np.ndarray:
    return np.bincount(images.drawn_labels, minlength=classes)


def _first_batch(config: Config, data: Data, sampler: Sampler) -> tuple[Values, Values, str]:
    """The first microbatch before and after the transform, and its targets in words."""
    loader = TrainLoader(data.train, sampler, Launch(torch.device("cpu"), 1, 0, 0, "no", 1), config)
    precropped = crops_while_decoding(data.train, config.augment)
    per_epoch = sampler.steps_per_epoch
    transform = build_transform(
        config, data.mean, data.std, data.num_classes, precropped=precropped, steps_per_epoch=per_epoch
    )
    batch = next(loader.batches(range(1)))
    rearranged = batch._replace(images=transform.rearrange(batch.images, batch.keys))
    images, targets = transform.train_batch(*rearranged, (config.run.seed, 0, 0))
    decoded = _values(batch.images.permute(0, 3, 1, 2).float() / 255)
    kind = f"{str(targets.dtype).removeprefix('torch.')} {'x'.join(map(str, targets.shape))}"
    return decoded, _values(images), f"{kind}, mixed" if targets.ndim > 1 else kind


def _values(images: Tensor) -> Values:
    """Of (B, C, H, W)."""
    exact = images.double()
    mean, std = exact.mean((0, 2, 3)), exact.std((0, 2, 3), correction=0)
    dtype = str(images.dtype).removeprefix("torch.")
    return Values(
        dtype, tuple(images.shape), float(exact.min()), float(exact.max()), tuple(mean.tolist()), tuple(std.tolist())
    )


def describe(config: Config, data: Data, preview: Preview) -> list[str]:
    """The preview in a few lines."""
    channels, height, width = data.image_shape
    sizes = ", ".join(f"{int(counts.sum()):,} {name}" for name, counts in preview.counts.items())
    microbatches = config.train.batch_size // preview.micro_batch_size
    return [
        f"data: {config.data.source}, {sizes} images of {height}x{width}x{channels} in {len(data.classes)} classes",
        *(f"labels: {line}" for line in _describe_labels(preview, class_names(data))),
        f"batch: {config.train.batch_size} images, {microbatches} x {preview.micro_batch_size}; the first microbatch:",
        f"  as decoded: {preview.before}",
        f"  as the network gets it: {preview.after}; targets {preview.targets}",
        f"training: {preview.total_steps:,} steps, {preview.steps_per_epoch:,} an epoch; "
        f"{_describe_rates(preview)}{_unless_it_stalls(config)}",
        *(f"duplicates: {line}" for line in _describe_duplicates(preview.duplicates)),
    ]


def _unless_it_stalls(config: Config) -> str:
    """What a plateau schedule will do, nobody can know yet."""
    return ", while validation does not stall" if config.schedule.name == "plateau" else ""


def _describe_rates(preview: Preview) -> str:
    first, last = preview.rates[0][1], preview.rates[-1][1]
    step, highest = max(preview.rates, key=lambda point: point[1])
    if highest == min(rate for _, rate in preview.rates):
        return f"learning rate {highest:.3g} throughout"
    peak = f", {highest:.3g} after step {step:,}" if step else ""
    return f"learning rate {first:.3g} at first{peak}, {last:.3g} at the end"


def _describe_labels(preview: Preview, names: list[str]) -> list[str]:
    lines = []
    for split, counts in preview.counts.items():
        lowest, highest = int(counts.argmin()), int(counts.argmax())
        line = f"{split}: {counts[lowest]:,} ({names[lowest]}) to {counts[highest]:,} ({names[highest]}) of a class"
        if counts[lowest] == counts[highest]:
            line = f"{split}: {counts[lowest]:,} of each class"
        missing = np.flatnonzero(counts == 0)
        if len(missing):
            shown = ", ".join(names[number] for number in missing[:_MOST_NAMED])
            line += f"; none of {len(missing)}: {shown}{', ...' * (len(missing) > _MOST_NAMED)}"
        lines.append(line)
    return lines


def _describe_duplicates(found: Duplicates) -> list[str]:
    extra = ", ".join(f"{count:,} of {found.looked_at[split]:,} in {split}" for split, count in found.extra.items())
    lines = [f"images whose pixels were there before: {extra}"]
    for (first, second), count in found.shared.items():
        if count:
            lines.append(f"{count:,} {second} image{'s are' if count > 1 else ' is'} in {first}, too")
    if count := len(found.contradicting):
        lines.append(f"{count:,} image{'s' * (count > 1)} with several labels (duplicates.png shows them first)")
    return lines


def draw_preview(folder: Path, config: Config, data: Data, preview: Preview) -> list[Path]:
    """Draw all pictures and write preview.json; returns the paths."""
    names = class_names(data)
    epochs, rates = [step / preview.steps_per_epoch for step, _ in preview.rates], [rate for _, rate in preview.rates]
    note = f"{config.schedule.name}, {preview.total_steps:,} steps{_unless_it_stalls(config)}"
    drawings = [
        Drawing(folder / "labels.png", partial(plot_label_counts, preview.counts, names)),
        Drawing(folder / "schedule.png", partial(plot_learning_rate, epochs, rates, note)),
        *drawings_of_training_set(folder, config, data),
        *_duplicates(folder, data, preview.duplicates, names),
    ]
    with drawn_beside(drawings) as finished:
        write_json(folder / "preview.json", _as_json(preview, names))
        return [*(drawing.path for drawing in finished), folder / "preview.json"]


def _duplicates(folder: Path, data: Data, found: Duplicates, names: list[str]) -> list[Drawing]:
    """Pairs of equal images side by side, those with several labels first and in red; nothing where there are none."""
    if not found.groups:
        return []
    wrong = {place for group in found.contradicting for place in group}
    groups = sorted(found.groups, key=lambda group: group[0] not in wrong)[:_MOST_PAIRS]
    places, sets = [place for group in groups for place in _pair(group, found)], sets_of(data)
    images = np.concatenate([pixels(sets[split], np.array([index])) for split, index in places])
    titles = [f"{names[found.labels[place]]}\n{place[0]} {place[1]}" for place in places]
    marks, columns = [place in wrong for place in places], min(len(places), 4)
    plot = partial(plot_samples, images, titles, wrong=marks, columns=columns)
    return [Drawing(folder / "duplicates.png", plot)]


def _pair(group: tuple[Place, ...], found: Duplicates) -> tuple[Place, Place]:
    """The first sample, and one of another label, else of another split, else the next."""
    first, *others = group
    return first, min(others, key=lambda place: (found.labels[place] == found.labels[first], place[0] == first[0]))


def _as_json(preview: Preview, names: list[str]) -> dict[str, Any]:
    found = preview.duplicates
    return {
        "batch": {"decoded": vars(preview.before), "network": vars(preview.after), "targets": preview.targets},
        "classes": names,
        "labels": preview.counts,
        "micro_batch_size": preview.micro_batch_size,
        "steps_per_epoch": preview.steps_per_epoch,
        "total_steps": preview.total_steps,
        "learning_rates": preview.rates,
        "duplicates": {
            "looked_at": found.looked_at,
            "within": found.extra,
            "between": {f"{first} and {second}": count for (first, second), count in found.shared.items()},
            "groups": [[[*place, found.labels[place]] for place in group] for group in found.groups],
        },
    }
