"""The picture of precision-recall and ROC curves, one class against the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lockstep.evaluation.ranking import Ranking, weakest
from lockstep.report.canvas import FAINT, GRID, INK, LONGEST_NAME, dress, new_figure, save, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the lines that are named; more could not be told apart"""
_MOST_FAINT = 100


def plot_rankings(rankings: dict[int, Ranking], classes: Sequence[str], path: Path) -> "Figure":
    """Precision over recall, and the ROC: the classes of the lowest average precision in colours, others faint.

    rankings: by class number, one at least; classes: all names. 1800 x 750 pixels.
    """
    figure = new_figure(12, 5.0)
    left, right = figure.subplots(1, 2)
    shown = weakest(rankings, _MOST_FAINT)
    for place, (number, ranking) in reversed(list(enumerate(shown.items()))):
        named = place < len(_COLORS)
        color, width = (_COLORS[place], 1.8) if named else (FAINT, 0.7)
        name = shorten(classes[number], LONGEST_NAME)
        labels = [f"{name}: {area:.4f}" if named else "" for area in (ranking.average_precision, ranking.auc)]
        left.plot(ranking.recall, ranking.precision, color=color, linewidth=width, label=labels[0])
        right.plot(ranking.false_positive_rate, ranking.recall, color=color, linewidth=width, label=labels[1])
    precision = float(np.mean([ranking.average_precision for ranking in rankings.values()]))
    auc = float(np.mean([ranking.auc for ranking in rankings.values()]))
    dress(left, f"Precision and recall: mean average precision {precision:.4f}", "Recall (share of the class found)")
    dress(right, f"ROC: mean area {auc:.4f}", "False positive rate (share of the others taken)")
    left.set_ylabel("Precision (share of those found that are right)", color=INK)
    right.set_ylabel("True positive rate (recall)", color=INK)
    few = "lowest average precision" if len(rankings) > len(_COLORS) else "average precision"
    for axes, title in ((left, few), (right, "area under the curve")):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.grid(color=GRID, linewidth=0.8)
        handles, names = axes.get_legend_handles_labels()
        legend = axes.legend(handles[::-1], names[::-1], title=title, frameon=False, labelcolor=INK, fontsize=9.5)
        legend.set_in_layout(False)  # it lies within
    return save(figure, path)
