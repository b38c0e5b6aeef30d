"""Names from the settings: found, or refused with what there is."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest

from lockstep.errors import UserError
from lockstep.settings.registry import choose, look_up


class Record(NamedTuple):
    settings: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    name: str
    momentum: float = 0.0
    lr: float = 0.1


RECORDS = {"plain": Record(), "heavy": Record(frozenset({"momentum"}))}


def test_a_name_is_found_or_the_nearest_is_named() -> None:
    assert look_up(RECORDS, "optim.name", "heavy") is RECORDS["heavy"]
    with pytest.raises(UserError, match="--optim.name=heavi is not one of plain, heavy. Did you mean heavy?"):
        look_up(RECORDS, "optim.name", "heavi")


def test_a_changed_setting_is_refused_by_those_it_means_nothing_to() -> None:
    assert choose(RECORDS, "optim.name", Section("heavy", momentum=0.9)) is RECORDS["heavy"]
    assert choose(RECORDS, "optim.name", Section("plain", lr=3)) is RECORDS["plain"]  # for all
    with pytest.raises(UserError, match="--optim.momentum=0.9 has no meaning for --optim.name=plain: remove it"):
        choose(RECORDS, "optim.name", Section("plain", momentum=0.9))
