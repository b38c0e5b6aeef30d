"""Where pieces run, and what they say when they cannot."""

from dataclasses import dataclass
from pathlib import Path


class Skipped(Exception):
    """Something that a piece needs is not here."""


@dataclass(frozen=True)
class Place:
    """Device and folders of a piece."""

    device: str
    """cuda, or cpu for a rehearsal: the same on smaller sizes, whose figures mean nothing"""
    scratch: Path
    """For runs and caches"""
    cifar10: str
    """CIFAR-10 as --data.source takes it"""

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"
