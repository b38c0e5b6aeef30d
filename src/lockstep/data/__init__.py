"""Data sets: sources, the cache of decoded images, the validation split, image sets and loaders."""

from lockstep.data.images import Data, ImageSet, build_data
from lockstep.data.source import Source, Split, open_source
from lockstep.data.split import draw_validation_split, load_or_draw_split

__all__ = [
    "Data",
    "ImageSet",
    "Source",
    "Split",
    "build_data",
    "draw_validation_split",
    "load_or_draw_split",
    "open_source",
]
