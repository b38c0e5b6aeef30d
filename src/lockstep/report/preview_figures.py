"""The pictures of a training that has not begun: how many images a class has, and the learning rate to come."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.report.canvas import INK, LONGEST_NAME, MOST_NAMES, SPLIT_COLORS, dress, new_figure, save, scale, shorten

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


def plot_label_counts(counts: "Mapping[str, np.ndarray]", classes: Sequence[str], path: Path) -> "Figure":
    """Images of each class, a panel for each split: counts (C,) by split, for C class names.

    Above 50 classes only some names are written. 1200 to 1800 pixels wide.
    """
    number = len(classes)
    every = math.ceil(number / MOST_NAMES)
    names = [shorten(name, LONGEST_NAME) for name in classes[::every]]
    upright = len(names) > 15 or max(map(len, names)) > 4
    longest = max(map(len, names)) * 0.07 if upright else 0.0
    figure = new_figure(min(12.0, 8.0 + number * 0.1), 1.7 * len(counts) + 0.4 + longest)
    panels = figure.subplots(len(counts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (split, values) in zip(panels, counts.items(), strict=True):
        axes.bar(range(number), values, width=0.8 if number <= 4 * MOST_NAMES else 1.0, color=SPLIT_COLORS[split])
        total, lowest, highest = (int(number) for number in (values.sum(), values.min(), values.max()))
        spread = f"{lowest:,} to {highest:,} of a class" if lowest < highest else f"{highest:,} of each class"
        dress(axes, f"{split}: {total:,} images, {spread}", "")
        scale(axes, percent=False)
        axes.set_ylim(0, max(int(values.max()), 1) * 1.08)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(axis="x", length=0)
    panels[-1].set_xticks(range(0, number, every), names, rotation=90 if upright else 0, fontsize=9, color=INK)
    panels[-1].set_xlim(-0.7, number - 0.3)
    return save(figure, path)


def plot_learning_rate(epochs: Sequence[float], rates: Sequence[float], note: str, path: Path) -> "Figure":
    """The learning rate over the epochs, with `note` in the title. 1200 x 570 pixels."""
    figure = new_figure(8, 3.8)
    axes = figure.subplots()
    axes.plot(epochs, rates, color=SPLIT_COLORS["train"], linewidth=1.8)
    dress(axes, f"Learning rate: {note}")
    scale(axes, percent=False)
    axes.set_ylim(bottom=0)
    return save(figure, path)
