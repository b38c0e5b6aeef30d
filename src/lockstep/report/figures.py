"""The run's pictures, as PNG files: curves, confusion matrix, samples, galleries.

Every function writes its file atomically, at a size that depends only on how much there is to show, and returns the
figure.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.report.canvas import (
    FAINT,
    GRID,
    INK,
    LONGEST_NAME,
    MOST_NAMES,
    SPLIT_COLORS,
    Tiles,
    draw_tiles,
    dress,
    new_figure,
    save,
    scale,
    shorten,
)
from lockstep.report.comparison import Curve, Group
from lockstep.run.history import Point, curve

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_WRONG = "#c0392b"
_MOST_SAMPLES = 25
_MOST_COUNTS = 25
_MOST_CLASSES, _MOST_CONFUSED = 100, 24
# Okabe and Ito's colours but for yellow, which white paper swallows: told apart by colour-blind readers, too.
GROUP_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")
_DASHES = ("-", "--", ":", "-.")
_PANELS = (
    ("Validation accuracy (% of samples)", "val", "accuracy"),
    ("Validation loss (mean of samples)", "val", "loss"),
    ("Training loss (mean of samples)", "train", "loss"),
    ("Learning rate (of an update)", "train", "lr"),
)
_LONGEST_LABEL = 80
_LEGEND_LETTERS = 150
_FAR_RATES = 20
_LONG_EPOCHS = 9


def plot_curves(history: Sequence[dict[str, Any]], path: Path) -> "Figure":
    """Loss, accuracy and learning rate over the epochs, from the records of `read_history`; the test result is marked.

    1800 x 570 pixels. Accuracy is a share in [0, 1] in the records and drawn in %. A panel without any number says so.
    """
    figure = new_figure(12, 3.8)
    loss, accuracy, lr = figure.subplots(1, 3)
    _draw_metric(loss, "Loss", {split: curve(history, split, "loss") for split in SPLIT_COLORS})
    _draw_metric(
        accuracy, "Accuracy", {split: curve(history, split, "accuracy") for split in SPLIT_COLORS}, percent=True
    )
    _draw_metric(lr, "Learning rate", {"train": curve(history, "train", "lr")})
    lr.set_ylim(bottom=0)  # a constant one is no zoom into nothing
    return save(figure, path)


def plot_comparison(groups: Sequence[Group], path: Path) -> "Figure":
    """Validation accuracy and loss, training loss and, where it differs, the learning rate of each group over epochs.

    A group has a colour (beyond seven groups, a colour and a dash): a line for the mean over its seeds, and a band from
    the lowest to the highest. 1800 pixels wide. Raises ValueError if there is no group.
    """
    if not groups:
        raise ValueError(f"no runs to draw in {path}")
    panels = panels_of(groups)
    has_seeds = any(len(group.seeds) > 1 for group in groups)
    labels = [_label(group, with_seeds=has_seeds) for group in groups]
    columns = max(1, min(len(groups), _LEGEND_LETTERS // (max(map(len, labels)) + 8)))
    lines, rows = math.ceil(len(groups) / columns), math.ceil(len(panels) / 3)
    figure = new_figure(12, 3.8 * rows + 0.24 * lines + 0.4)
    grid = figure.subplots(rows, math.ceil(len(panels) / rows), squeeze=False).flat
    for axes, (title, split, key) in zip(grid, panels, strict=True):
        dress(axes, title)
        scale(axes, percent=key == "accuracy")
        axes.xaxis.get_major_locator().set_params(integer=True)
        curves = [group.curve(split, key) for group in groups]
        for index, shape in enumerate(curves):
            _draw_group(axes, shape, index, labels[index])
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=FAINT)
        if key == "lr":
            _show_far_rates(axes)
        else:
            _show_late_epochs(axes, curves)
    handles = [_group_line(index, label) for index, label in enumerate(labels)]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    if has_seeds:
        legend.set_title("Line: mean over seeds; band: lowest to highest")
    return save(figure, path)


def plot_confusion_matrix(counts: "np.ndarray", classes: Sequence[str], path: Path) -> "Figure":
    """Heat map of a confusion matrix: rows are true classes, columns predictions, colours shares of the row.

    counts: (C, C) integers, C >= 1. Counts are written out up to 25 classes; above 50 only some names are, and above
    100 only the 24 classes of the most frequent confusions are drawn. The side grows with C from 900 to 2250 pixels.
    Raises ValueError if counts are not (C, C) for C class names.
    """
    import numpy as np

    counts = np.asarray(counts)
    number = len(classes)
    if counts.shape != (number, number) or number == 0:
        raise ValueError(f"a confusion matrix of shape {counts.shape} does not fit {number} class names")
    right, total = int(np.trace(counts)), int(counts.sum())
    title = f"{right:,} of {total:,} right: accuracy {right / total:.1%}" if total else "no samples"
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)  # a class without samples stays white
    if number > _MOST_CLASSES:
        shown = _most_confused(counts, _MOST_CONFUSED)
        counts, shares, classes = counts[shown][:, shown], shares[shown][:, shown], [classes[i] for i in shown]
        title += f"\nof {number:,} classes the {len(shown)} of the most frequent confusions"
    side = min(max(6.0, 3.2 + 0.36 * len(classes)), 15.0)
    figure = new_figure(side, side * 0.92)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if len(classes) <= _MOST_COUNTS:
        _write_counts(axes, counts, shares)
    _name_classes(axes, classes)
    axes.set_title(title.replace("%", " %"), color=INK, fontsize=12, fontweight="bold", loc="left", pad=10, y=1.0)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, aspect=30, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share * 100:.0f} %")
    bar.set_label("share of the true class", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=INK, labelsize=9)
    return save(figure, path)


def plot_samples(
    images: "np.ndarray",
    titles: Sequence[str],
    path: Path,
    *,
    wrong: Sequence[bool] | None = None,
    columns: int | None = None,
) -> "Figure":
    """Grid of the first 25 images with a title of a line or more each; where `wrong` is true, title and frame are red.

    images: uint8 (N, H, W, C), C = 1 or 3, N >= 1; columns: images in a row (default: about as many as rows).
    Raises ValueError if there is no image or lengths differ.
    """
    number = min(len(images), _MOST_SAMPLES)
    if number == 0:
        raise ValueError(f"no images to draw in {path}")
    from matplotlib.patches import Rectangle

    marks = [False] * len(images) if wrong is None else list(wrong)
    if not len(images) == len(titles) == len(marks):
        raise ValueError(f"{len(images)} images need as many titles and marks, not {len(titles)} and {len(marks)}")
    columns = columns or math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    lines = 1 + max(title.count("\n") for title in titles[:number])
    room = 0.1 + 0.15 * lines  # above an image, in its widths
    tiles = Tiles(columns, rows, images.shape[1] / images.shape[2], room)
    figure = new_figure(columns * 1.7, rows * (1.5 * tiles.tall + 1.5 * room + 0.1))
    axes = figure.subplots()
    draw_tiles(axes, tiles, [images[first : min(first + columns, number)] for first in range(0, number, columns)])
    for index in range(number):
        left, right, bottom, top = tiles.extent(*divmod(index, columns))
        color = _WRONG if marks[index] else INK
        axes.text((left + right) / 2, top + 0.03, _lines(titles[index]), fontsize=10, color=color, ha="center")
        if marks[index]:
            corner, width, height = (left, bottom), right - left, top - bottom
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_WRONG, linewidth=2))
    return save(figure, path)


def plot_gallery(rows: "Sequence[tuple[str, np.ndarray]]", titles: Sequence[str], path: Path) -> "Figure":
    """Rows of images with a name each, and a title above each column.

    rows: names and uint8 (N, H, W, C), C = 1 or 3; a shorter row leaves its last places empty. Raises ValueError if
    there is no image.
    """
    columns = max((len(images) for _, images in rows), default=0)
    if columns == 0:
        raise ValueError(f"no images to draw in {path}")
    tiles = Tiles(columns, len(rows), rows[0][1].shape[1] / rows[0][1].shape[2])
    figure = new_figure(2.2 + columns * 1.35, 0.5 + len(rows) * 1.35 * max(tiles.tall, 0.3))
    axes = figure.subplots()
    draw_tiles(axes, tiles, [images for _, images in rows])
    names = [shorten(name, LONGEST_NAME) for name, _ in rows]
    axes.set_yticks([tiles.centre(row, 0)[1] for row in range(len(rows))], names, fontsize=11, color=INK)
    axes.set_xticks([tiles.centre(0, column)[0] for column in range(len(titles))], titles, fontsize=10, color=INK)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    return save(figure, path)


# ---- Curves ----------------------------------------------------------------------------------------------------------


def _draw_metric(axes: "Axes", title: str, curves: dict[str, list[Point]], *, percent: bool = False) -> None:
    dress(axes, title)
    if not any(curves.values()):
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=FAINT)
        axes.set(xticks=[], yticks=[])
        return
    scale(axes, percent=percent)
    shown = "{:.1%}" if percent else "{:.3f}"
    for split, points in curves.items():
        _draw_line(axes, split, points, shown)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, handlelength=1.6).set_in_layout(False)


def _draw_line(axes: "Axes", split: str, points: list[Point], shown: str) -> None:
    """A line; a few points get markers; the test result is one diamond, its value in the legend."""
    if not points:
        return
    epochs, values, _ = zip(*points, strict=True)
    color = SPLIT_COLORS[split]
    if split == "test":
        label = f"test {shown.format(values[-1])}".replace("%", " %")
        axes.plot(epochs[-1], values[-1], "D", color=color, markersize=7, zorder=3, clip_on=False, label=label)
    else:
        marker = "o" if len(points) <= 40 and (split == "val" or len(points) == 1) else None
        axes.plot(epochs, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=split)


# ---- Comparison -----------------------------------------------------------------------------------------------------


def panels_of(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """Title, split and key of each panel: that of the learning rate only where it differs."""
    return [panel for panel in _PANELS if panel[2] != "lr" or _rates_differ(groups)]


def _rates_differ(groups: Sequence[Group]) -> bool:
    """Whether two groups had another learning rate at a step that both have reached."""
    first, *others = [curve(group.runs[0].history, "train", "lr") for group in groups]
    return any(ours != theirs for other in others for ours, theirs in zip(first, other, strict=False))


def _label(group: Group, *, with_seeds: bool) -> str:
    number = len(group.seeds)
    return shorten(group.label, _LONGEST_LABEL) + f" ({number} seed{'s' * (number != 1)})" * with_seeds


def _show_late_epochs(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Let the beginning of a longer training run out of the panel: it is steep for all, and presses the ends together.

    The scale is that of the last two thirds of each.
    """
    curves = [shape for shape in curves if len(shape.epochs)]
    last = max((shape.epochs[-1] for shape in curves), default=0)
    ends = [
        value
        for shape in curves
        for values in (shape.low, shape.high)
        for value in values[shape.epochs >= shape.epochs[-1] / 3]
    ]
    if last >= _LONG_EPOCHS and max(ends) > min(ends):
        margin = 0.08 * (max(ends) - min(ends))
        axes.set_ylim(min(ends) - margin, max(ends) + margin)


def _show_far_rates(axes: "Axes") -> None:
    """A logarithmic scale where one group's highest rate is far above another's, which would lie on the axis.

    It ends two decades below the lowest of the highest rates: schedules fall to nothing at the end.
    """
    import numpy as np
    from matplotlib.ticker import NullFormatter

    highest = [float(np.asarray(line.get_ydata()).max()) for line in axes.lines]
    if max(highest, default=0) > _FAR_RATES * min(highest, default=0) > 0:
        shown = axes.yaxis.get_major_formatter()
        axes.set_yscale("log")
        axes.set_ylim(min(highest) / 100, max(highest) * 1.5)
        axes.yaxis.set_major_formatter(shown)
        axes.yaxis.set_minor_formatter(NullFormatter())


def _group_line(index: int, label: str) -> "Line2D":
    """The line of a group in every panel and in the legend; groups beyond the colours have another dash."""
    from matplotlib.lines import Line2D

    color = GROUP_COLORS[index % len(GROUP_COLORS)]
    style: Any = _DASHES[index // len(GROUP_COLORS) % len(_DASHES)]
    return Line2D([], [], color=color, linestyle=style, linewidth=1.8, label=label)


def _draw_group(axes: "Axes", shape: Curve, index: int, label: str) -> None:
    if not len(shape.epochs):
        return
    line = _group_line(index, label)
    line.set_data(shape.epochs, shape.mean)
    line.set_marker("o" if len(shape.epochs) == 1 else "")
    axes.add_line(line)
    if (shape.high > shape.low).any():
        axes.fill_between(shape.epochs, shape.low, shape.high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.autoscale_view()


# ---- Confusion matrix ------------------------------------------------------------------------------------------------


def _most_confused(counts: "np.ndarray", most: int) -> list[int]:
    """The classes of the most frequent confusions, those of the first one first."""
    import numpy as np

    wrong = counts - np.diag(np.diag(counts))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[: most**2]
    classes = np.stack(np.unravel_index(pairs, wrong.shape), axis=1).ravel().tolist()
    return list(dict.fromkeys(classes))[:most]


def _write_counts(axes: "Axes", counts: "np.ndarray", shares: "np.ndarray") -> None:
    size = 11 if len(counts) <= 12 else 8
    for row, column in zip(*counts.nonzero(), strict=True):
        color = "white" if shares[row, column] > 0.5 else INK
        count = int(counts[row, column])
        axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=size, in_layout=False)


def _name_classes(axes: "Axes", classes: Sequence[str]) -> None:
    every = math.ceil(len(classes) / MOST_NAMES)
    names = [shorten(name, LONGEST_NAME) for name in classes[::every]]
    places = range(0, len(classes), every)
    upright = len(names) > 15 or max(map(len, names)) > 4
    size = 10 if len(names) <= 25 else 8
    axes.set_xticks(places, names, rotation=90 if upright else 0, fontsize=size, color=INK)
    axes.set_yticks(places, names, fontsize=size, color=INK)
    axes.set_xlabel("predicted class", color=INK, fontsize=11)
    axes.set_ylabel("true class", color=INK, fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_color(GRID)


def _lines(title: str) -> str:
    return "\n".join(shorten(line, 24) for line in title.split("\n"))


Distances = dict[str, dict[str, Sequence[float]]]


def plot_distances(panels: dict[str, Distances], steps: Sequence[int], path: Path) -> "Figure":
    """How far launches of one training are apart, step by step: a panel per precision, a line per launch.

    `panels`: title to program to launch to relative distances; a program has a colour. A distance of 0, which a
    logarithmic axis has no place for, is drawn at its foot. 1800 x 630 pixels for two panels.
    """
    figure = new_figure(6 * len(panels), 4.2)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    floor = 1e-9
    for axes, (title, programs) in zip(all_axes, panels.items(), strict=True):
        for (program, launches), color in zip(programs.items(), ("#2a8a57", "#3b6fb6", "#d9702b"), strict=False):
            for (launch, distances), style in zip(launches.items(), ("-", "--", ":"), strict=False):
                heights = [max(distance, floor) for distance in distances]
                axes.plot(steps, heights, style, color=color, linewidth=2.0, label=f"{program}, {launch}")
        axes.set_title(title, loc="left", fontweight="bold", color=INK)
        axes.set_xlabel("Step", color=INK)
        axes.set_yscale("log")
        axes.set_ylim(floor / 2, 10)
    ticks = [10.0**exponent for exponent in range(-7, 2, 2)]
    all_axes[0].set_yticks([floor, *ticks], ["0", *(f"$10^{{{round(math.log10(tick))}}}$" for tick in ticks)])
    all_axes[0].set_ylabel("Distance from one process", color=INK)
    all_axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(figure, path)
