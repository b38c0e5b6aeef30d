"""What all pictures share: here, that a file holds what matplotlib's own writing draws, which does so twice."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lockstep.report.canvas import DPI, dress, new_figure, save, scale


def test_a_picture_is_drawn_once_and_is_the_one_that_matplotlib_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure, draw, times = new_figure(4, 3), Figure.draw, []
    axes = figure.subplots()
    axes.plot([0, 1, 2], [3, 1, 2])
    dress(axes, "Some title")
    scale(axes, percent=True)
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: times.append(self) or draw(self, renderer))
    save(figure, tmp_path / "own.png")
    assert times == [figure]
    figure.savefig(tmp_path / "usual.png", dpi=DPI)
    with Image.open(tmp_path / "own.png") as own, Image.open(tmp_path / "usual.png") as usual:
        assert own.mode == "RGB" and own.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
        assert np.array_equal(np.asarray(own), np.asarray(usual.convert("RGB")))
    assert (tmp_path / "own.png").stat().st_size < 1.3 * (tmp_path / "usual.png").stat().st_size
