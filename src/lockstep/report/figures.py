"""The run's pictures, as PNG files: curves, confusion matrix, samples, the effect of each transform.

Figures are made with matplotlib's object API alone: no global state, no window, safe on any machine and in any thread.
Every function writes its file atomically, at a size that depends only on how much there is to show, and returns the
figure.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.files import written_aside

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_COLORS = {"train": "#3b6fb6", "val": "#d9702b", "test": "#2a8a57"}  # told apart by colour-blind readers too
_INK, _FAINT, _GRID, _WRONG = "#333333", "#8a8a8a", "#e6e6e6", "#c0392b"
_MOST_SAMPLES = 25
_MOST_COUNTS = 25
_MOST_NAMES = 50
_LONGEST_NAME = 20


def plot_curves(history: Sequence[dict[str, Any]], path: Path) -> "Figure":
    """Loss, accuracy and learning rate over the epochs, from the records of `read_history`; the test result is marked.

    1800 x 570 pixels. Accuracy is a share in [0, 1] in the records and drawn in %. A panel without any number says so.
    """
    figure = _new_figure(12, 3.8)
    loss, accuracy, lr = figure.subplots(1, 3)
    scale = _epochs_per_step(history)
    _draw_metric(loss, "Loss", {split: _series(history, split, "loss", scale) for split in _COLORS})
    shares = {split: _series(history, split, "accuracy", scale) for split in _COLORS}
    _draw_metric(accuracy, "Accuracy", shares, percent=True)
    _draw_metric(lr, "Learning rate", {"train": _series(history, "train", "lr", scale)})
    return _save(figure, path)


def plot_confusion_matrix(counts: "np.ndarray", classes: Sequence[str], path: Path) -> "Figure":
    """Heat map of a confusion matrix: rows are true classes, columns predictions, colours shares of the row.

    counts: (C, C) integers, C >= 1. Counts are written out up to 25 classes; above 50 only some names are. The side
    grows with C from 900 to 2250 pixels. Raises ValueError if counts are not (C, C) for C class names.
    """
    import numpy as np

    counts = np.asarray(counts)
    number = len(classes)
    if counts.shape != (number, number) or number == 0:
        raise ValueError(f"a confusion matrix of shape {counts.shape} does not fit {number} class names")
    side = min(max(6.0, 3.2 + 0.36 * number), 15.0)
    figure = _new_figure(side, side * 0.92)
    axes = figure.subplots()
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)  # a class without samples stays white
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if number <= _MOST_COUNTS:
        _write_counts(axes, counts, shares)
    _name_classes(axes, classes)
    right, total = int(np.trace(counts)), int(counts.sum())
    title = f"{right:,} of {total:,} right: accuracy {right / total:.1%}" if total else "no samples"
    axes.set_title(title.replace("%", " %"), color=_INK, fontsize=12, fontweight="bold", loc="left", pad=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, aspect=30, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share * 100:.0f} %")
    bar.set_label("share of the true class", color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=_INK, labelsize=9)
    return _save(figure, path)


def plot_samples(
    images: "np.ndarray", titles: Sequence[str], path: Path, *, wrong: Sequence[bool] | None = None
) -> "Figure":
    """Grid of the first 25 images with a title of a line or more each; where `wrong` is true, title and frame are red.

    images: uint8 (N, H, W, C), C = 1 or 3, N >= 1. Raises ValueError if there is no image or lengths differ.
    """
    number = min(len(images), _MOST_SAMPLES)
    if number == 0:
        raise ValueError(f"no images to draw in {path}")
    marks = [False] * len(images) if wrong is None else list(wrong)
    if not len(images) == len(titles) == len(marks):
        raise ValueError(f"{len(images)} images need as many titles and marks, not {len(titles)} and {len(marks)}")
    columns = math.ceil(math.sqrt(number))
    lines = 1 + max(title.count("\n") for title in titles[:number])
    figure = _new_figure(columns * 1.7, math.ceil(number / columns) * (1.8 + 0.15 * lines))
    grid = figure.subplots(math.ceil(number / columns), columns, squeeze=False).flat
    for index, axes in enumerate(grid):
        _draw_image(axes, images[index] if index < number else None)
        if index < number:
            color = _WRONG if marks[index] else _INK
            axes.set_title(_lines(titles[index]), fontsize=10, color=color, pad=4)
            if marks[index]:
                axes.spines[:].set(visible=True, color=_WRONG, linewidth=2)
    return _save(figure, path)


def plot_transforms(rows: "dict[str, np.ndarray]", path: Path) -> "Figure":
    """Gallery of what transforms do: one labelled row of images per transform, in the order given.

    rows: name -> uint8 (N, H, W, C), C = 1 or 3; a shorter row leaves its last places empty. Raises ValueError if
    there is no image.
    """
    columns = max((len(images) for images in rows.values()), default=0)
    if columns == 0:
        raise ValueError(f"no images to draw in {path}")
    figure = _new_figure(1.8 + columns * 1.35, len(rows) * 1.4 + 0.1)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for index, axes in enumerate(line):
            _draw_image(axes, images[index] if index < len(images) else None)
        line[0].set_ylabel(
            _shorten(name, _LONGEST_NAME), rotation=0, ha="right", va="center", labelpad=8, fontsize=11, color=_INK
        )
    return _save(figure, path)


# ---- Curves ----------------------------------------------------------------------------------------------------------


def _epochs_per_step(history: Sequence[dict[str, Any]]) -> float:
    """Records count whole epochs, too coarse an axis; the first validation, at an epoch's end, gives the scale."""
    records = [record for record in history if record.get("step") and record.get("epoch")]
    validated = [record for record in records if record.get("split") == "val"]
    chosen = (validated or records[-1:] or [{"epoch": 1, "step": 1}])[0]
    return float(chosen["epoch"]) / float(chosen["step"])


def _series(history: Sequence[dict[str, Any]], split: str, key: str, scale: float) -> list[tuple[float, float]]:
    """(epoch, value) of the records that have the value; NaN stays, as a gap in the line.

    A test stands at the step whose weights were tested.
    """
    records = [record for record in history if record.get("split") == split and record.get(key) is not None]
    return [(record.get("best_step", record.get("step", 0)) * scale, float(record[key])) for record in records]


def _draw_metric(
    axes: "Axes", title: str, curves: dict[str, list[tuple[float, float]]], *, percent: bool = False
) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=8)
    axes.set_xlabel("Epoch", color=_INK, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(color=_FAINT, labelcolor=_INK, labelsize=9)
    if not any(curves.values()):
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=_FAINT)
        axes.set(xticks=[], yticks=[])
        return
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.03, y=0.08)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.3g} %" if percent else f"{value:.4g}")
    shown = "{:.1%}" if percent else "{:.3f}"
    for split, points in curves.items():
        _draw_line(axes, split, points, shown)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=_INK, handlelength=1.6)


def _draw_line(axes: "Axes", split: str, points: list[tuple[float, float]], shown: str) -> None:
    """A line; a few points get markers; the test result is one diamond, its value in the legend."""
    if not points:
        return
    epochs, values = zip(*points, strict=True)
    color = _COLORS[split]
    if split == "test":
        label = f"test {shown.format(values[-1])}".replace("%", " %")
        axes.plot(epochs[-1], values[-1], "D", color=color, markersize=7, zorder=3, clip_on=False, label=label)
    else:
        marker = "o" if len(points) <= 40 and (split == "val" or len(points) == 1) else None
        axes.plot(epochs, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=split)


# ---- Confusion matrix ------------------------------------------------------------------------------------------------


def _write_counts(axes: "Axes", counts: "np.ndarray", shares: "np.ndarray") -> None:
    size = 11 if len(counts) <= 12 else 8
    for row, column in zip(*counts.nonzero(), strict=True):
        color = "white" if shares[row, column] > 0.5 else _INK
        count = int(counts[row, column])
        axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=size)


def _name_classes(axes: "Axes", classes: Sequence[str]) -> None:
    every = math.ceil(len(classes) / _MOST_NAMES)
    names = [_shorten(name, _LONGEST_NAME) for name in classes[::every]]
    places = range(0, len(classes), every)
    upright = len(names) > 15 or max(map(len, names)) > 4
    size = 10 if len(names) <= 25 else 8
    axes.set_xticks(places, names, rotation=90 if upright else 0, fontsize=size, color=_INK)
    axes.set_yticks(places, names, fontsize=size, color=_INK)
    axes.set_xlabel("predicted class", color=_INK, fontsize=11)
    axes.set_ylabel("true class", color=_INK, fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_color(_GRID)


# ---- Shared ----------------------------------------------------------------------------------------------------------


def _new_figure(width_inches: float, height_inches: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width_inches, height_inches), dpi=_DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _draw_image(axes: "Axes", image: "np.ndarray | None") -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if image is None:
        return
    assert image.ndim == 3 and image.shape[2] in (1, 3), image.shape
    shown = image[:, :, 0] if image.shape[2] == 1 else image
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _lines(title: str) -> str:
    return "\n".join(_shorten(line, 24) for line in title.split("\n"))


def _shorten(text: str, most: int) -> str:
    """A name as it can be drawn: `$` would begin a formula, and bytes that are no UTF-8 have no glyph."""
    text = text.encode(errors="replace").decode().replace("$", r"\$")
    return text if len(text) <= most else text[: most - 3] + "..."


def _save(figure: "Figure", path: Path) -> "Figure":
    with written_aside(path) as file:
        figure.savefig(file, format="png", dpi=_DPI)
    return figure


Distances = dict[str, dict[str, Sequence[float]]]


def plot_distances(panels: dict[str, Distances], steps: Sequence[int], path: Path) -> "Figure":
    """How far launches of one training are apart, step by step: a panel per precision, a line per launch.

    `panels`: title to program to launch to relative distances; a program has a colour. A distance of 0, which a
    logarithmic axis has no place for, is drawn at its foot. 1800 x 630 pixels for two panels.
    """
    figure = _new_figure(6 * len(panels), 4.2)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    floor = 1e-9
    for axes, (title, programs) in zip(all_axes, panels.items(), strict=True):
        for (program, launches), color in zip(programs.items(), ("#2a8a57", "#3b6fb6", "#d9702b"), strict=False):
            for (launch, distances), style in zip(launches.items(), ("-", "--", ":"), strict=False):
                heights = [max(distance, floor) for distance in distances]
                axes.plot(steps, heights, style, color=color, linewidth=2.0, label=f"{program}, {launch}")
        axes.set_title(title, loc="left", fontweight="bold", color=_INK)
        axes.set_xlabel("Step", color=_INK)
        axes.set_yscale("log")
        axes.set_ylim(floor / 2, 10)
    ticks = [10.0**exponent for exponent in range(-7, 2, 2)]
    all_axes[0].set_yticks([floor, *ticks], ["0", *(f"$10^{{{round(math.log10(tick))}}}$" for tick in ticks)])
    all_axes[0].set_ylabel("Distance from one process", color=_INK)
    all_axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, path)
