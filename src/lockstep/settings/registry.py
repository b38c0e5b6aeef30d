"""Registries: what a name in the settings stands for, and which other settings mean something to it.

A registry is a dict from names to records, beside the functions that its records hold.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, Protocol, TypeVar

from lockstep.errors import UserError, did_you_mean
from lockstep.settings.types import written


class _WithSettings(Protocol):
    @property
    def settings(self) -> frozenset[str]:
        """Settings of the section that mean something to this record alone."""
        ...


Record = TypeVar("Record")
RecordWithSettings = TypeVar("RecordWithSettings", bound=_WithSettings)


def look_up(records: Mapping[str, Record], setting: str, name: str) -> Record:
    """The record called `name`, the value of `setting`; raises UserError that lists all names, and the nearest."""
    if name in records:
        return records[name]
    raise UserError(f"--{setting}={name} is not one of {', '.join(records)}.{did_you_mean(name, records)}".rstrip("."))


def choose(records: Mapping[str, RecordWithSettings], setting: str, section: Any) -> RecordWithSettings:
    """The record that `setting`, such as optim.name, names in its section of the settings.

    Raises UserError if there is none of that name, or if a setting was changed that only other records use.
    """
    record = look_up(records, setting, getattr(section, setting.split(".")[1]))
    refuse_unused(setting, section, record.settings, frozenset().union(*(other.settings for other in records.values())))
    return record


def refuse_unused(setting: str, section: Any, used: Collection[str], optional: Collection[str]) -> None:
    """Raise UserError if one of the `optional` settings was changed, but is not `used` by what `setting` names."""
    name, key = setting.split(".")
    for other in fields(section):
        value = getattr(section, other.name)
        if other.name in optional and other.name not in used and value != other.default:
            takes = f" (it takes {', '.join(sorted(used))})" if used else ""
            raise UserError(
                f"--{name}.{other.name}={written(value)} has no meaning for --{setting}={getattr(section, key)}: "
                f"remove it{takes}"
            )
