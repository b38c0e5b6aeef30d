"""The picture of a network's calibration: how often it is right where it is so and so confident."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.evaluation.calibration import Reliability
from lockstep.report.canvas import FAINT, GRID, INK, dress, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RIGHT, _GAP = "#56b4e9", "#d55e00"  # of Okabe and Ito: told apart by colour-blind readers, too


def plot_reliability(shown: dict[str, Reliability], path: Path) -> "Figure":
    """For each title, accuracy over confidence with the gap between them, and how many samples each bin has.

    900 pixels wide for each, 1020 high. A bin without samples stays empty.
    """
    figure = new_figure(6 * len(shown), 6.8)
    grid = figure.subplots(2, len(shown), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for (title, bins), (above, below) in zip(shown.items(), grid.T, strict=True):
        _draw_accuracy(above, bins)
        dress(above, f"{title}: calibration error {bins.error:.4f}", "")
        _draw_counts(below, bins)
    grid[0, 0].set_ylabel("Accuracy (share of the bin that is right)", color=INK)
    grid[1, 0].set_ylabel("Samples (log)", color=INK)
    grid[1, 0].set_ylim(0.5, 2 * max(bins.counts.max() for bins in shown.values()))  # of all, which share it
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return save(figure, path)


def _places(bins: Reliability) -> tuple[np.ndarray, float]:
    """Centre of each bin, and their width."""
    width = 1 / len(bins.counts)
    return (np.arange(len(bins.counts)) + 0.5) * width, width


def _draw_accuracy(axes: "Axes", bins: Reliability) -> None:
    centres, width = _places(bins)
    full = bins.counts > 0
    centres, accuracy, confidence = centres[full], bins.accuracy[full], bins.confidence[full]
    axes.bar(centres, accuracy, 0.9 * width, color=_RIGHT, label="accuracy", zorder=2)
    gap: dict[str, Any] = {"facecolor": "none", "edgecolor": _GAP, "hatch": "////", "linewidth": 1.2, "zorder": 3}
    axes.bar(centres, confidence - accuracy, 0.9 * width, bottom=accuracy, label="gap to the mean confidence", **gap)
    axes.plot([0, 1], [0, 1], "--", color=INK, linewidth=1.2, label="perfectly calibrated", zorder=4)
    axes.set(xlim=(-0.01, 1.01), ylim=(0, 1.02))
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def _draw_counts(axes: "Axes", bins: Reliability) -> None:
    centres, width = _places(bins)
    full = bins.counts > 0
    axes.bar(centres[full], bins.counts[full], 0.9 * width, color=FAINT)
    axes.set_yscale("log")
    dress(axes, "", "Confidence (probability of the predicted class)")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
