"""Images that are in a data set more than once, by their decoded pixels: within a split and between splits."""

import hashlib
from dataclasses import dataclass
from itertools import combinations

from lockstep.data.images import Data, ImageSet
from lockstep.data.sources.source import spread

Place = tuple[str, int]
"""Split and sample"""
_MOST_STREAMED = 5000
"""Images of a split that are decoded for this, where none is in memory"""


@dataclass(frozen=True)
class Duplicates:
    """What is there more than once."""

    groups: tuple[tuple[Place, ...], ...]
    """Samples of equal pixels, two at least, in the order of the splits"""
    labels: dict[Place, int]
    """Of these samples"""
    looked_at: dict[str, int]
    """Images of each split that were compared"""

    @property
    def extra(self) -> dict[str, int]:
        """By split, the samples that an earlier one of it equals."""
        splits = [[split for split, _ in group] for group in self.groups]
        return {name: sum(max(0, names.count(name) - 1) for names in splits) for name in self.looked_at}

    @property
    def shared(self) -> dict[tuple[str, str], int]:
        """By pair of splits, the samples of the second that are in the first, too."""
        counts = dict.fromkeys(combinations(self.looked_at, 2), 0)
        for group in self.groups:
            names = [split for split, _ in group]
            for first, second in counts:
                counts[first, second] += names.count(second) if first in names else 0
        return counts

    @property
    def contradicting(self) -> tuple[tuple[Place, ...], ...]:
        """Groups whose samples have several labels."""
        return tuple(group for group in self.groups if len({self.labels[place] for place in group}) > 1)


def find_duplicates(data: Data) -> Duplicates:
    """Look through all images that are in memory; of streamed splits, through 5,000 spread over each."""
    sets = {"train": data.train, "val": data.val, "test": data.test}
    if data.val is data.test:
        del sets["val"]
    seen: dict[bytes, list[Place]] = {}
    labels: dict[Place, int] = {}
    looked_at = {}
    for name, images in sets.items():
        if images is None:
            continue
        chosen = range(len(images)) if images.images is not None else spread(len(images), _MOST_STREAMED)
        looked_at[name] = 0
        for index in chosen:
            if (key := _key(images, index)) is not None:
                seen.setdefault(key, []).append((name, index))
                labels[name, index] = int(images.labels[index])
                looked_at[name] += 1
    groups = tuple(tuple(group) for group in seen.values() if len(group) > 1)
    return Duplicates(groups, {place: labels[place] for group in groups for place in group}, looked_at)


def _key(images: ImageSet, index: int) -> bytes | None:
    pixels = images.load(index)
    return None if pixels is None else hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
