"""Letters of any language in figures."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager

from lockstep.report import fonts
from lockstep.report.figures import plot_confusion_matrix, plot_samples

HORSE = "馬 horse"
STIX = str(Path(font_manager.findfont("STIXGeneral")))


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fonts that the system has, to be filled by the test."""
    installed: list[str] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: installed)
    fonts._font_with.cache_clear()
    yield installed
    fonts._font_with.cache_clear()


def titles(path: Path, names: list[str]) -> list[tuple[str, list[str]]]:
    figure = plot_samples(np.zeros((len(names), 8, 8, 1), np.uint8), names, path)
    return [(text.get_text(), text.get_fontfamily()) for text in figure.axes[0].texts]


def test_letters_without_a_font_are_question_marks(tmp_path: Path, only: list[str]) -> None:
    # A warning of matplotlib's, of a missing glyph, would fail this test.
    (horse, cat) = titles(tmp_path / "a.png", [HORSE, "café"])
    assert horse[0] == "? horse" and cat == ("café", ["sans-serif"])
    plot_confusion_matrix(np.eye(2, dtype=int), [HORSE, "犬"], tmp_path / "b.png")


def test_a_font_of_the_system_is_used(tmp_path: Path, only: list[str]) -> None:
    letter = next(
        chr(code) for code in sorted(fonts._letters_of(STIX)) if not fonts._draws(fonts._usual_path(), chr(code))
    )
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    only += [str(broken), STIX]
    ((text, families),) = titles(tmp_path / "a.png", [f"{letter} and 馬"])
    assert text == f"{letter} and ?" and families == ["DejaVu Sans", "STIXGeneral"]
