"""Letters of any language in figures, by whatever fonts the system has."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_USUAL = "DejaVu Sans"
"""Comes with matplotlib"""


def drawable(text: str) -> str:
    """The text with "?" for letters that no font has: matplotlib would draw boxes, and warn."""
    return text.translate({ord(letter): "?" for letter, family in _fonts_for(text).items() if family is None})


def set_fonts(figure: "Figure") -> None:
    """Give texts with letters that the usual font lacks a font that has them."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if fonts := _fonts_for(text.get_text()):
            text.set_fontfamily([_USUAL, *dict.fromkeys(family for family in fonts.values() if family)])


def _fonts_for(text: str) -> dict[str, str | None]:
    """The letters of a text that the usual font lacks, and the family that has each."""
    lacking = sorted({letter for letter in text if ord(letter) > 0x7F and not _draws(_usual_path(), letter)})
    return {letter: _font_with(letter) for letter in lacking}


@cache
def _font_with(letter: str) -> str | None:
    """The family of a font of the system's that has a letter, known to matplotlib from now on."""
    from matplotlib import font_manager

    for path in sorted(font_manager.findSystemFonts()):
        if _draws(path, letter):
            font_manager.fontManager.addfont(path)
            return font_manager.FontProperties(fname=path).get_name()
    return None


def _usual_path() -> str:
    from matplotlib import font_manager

    return str(font_manager.findfont(_USUAL))


def _draws(path: str, letter: str) -> bool:
    return ord(letter) in _letters_of(path)


@cache
def _letters_of(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a font that FreeType cannot read is none
        return frozenset()
