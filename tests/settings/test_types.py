"""Values against type hints."""

import math
from typing import Any, Literal

import pytest

from lockstep.errors import UserError
from lockstep.settings.types import checked, describe, written

Mode = Literal["auto", "never"]


@pytest.mark.parametrize(
    ("value", "hint", "typed"),
    [
        (3, float, 3.0),
        (3, int, 3),
        (None, float | None, None),
        ("auto", Mode, "auto"),
        (7, int | Mode, 7),
        ([1, 2.5], tuple[float, ...], (1.0, 2.5)),
        ([], tuple[int, ...], ()),
        (True, bool, True),
        ("text", str, "text"),
    ],
)
def test_what_fits_comes_back_in_its_type(value: Any, hint: Any, typed: Any) -> None:
    found = checked("a.b", value, hint)
    assert found == typed and type(found) is type(typed)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (None, float, "--a.b=null: expected a number"),
        (math.nan, float, "--a.b=nan: expected a number"),
        (math.inf, float | None, "--a.b=inf: expected a number or null"),
        (10**400, float, "expected a number"),
        (True, int, "--a.b=true: expected a whole number"),
        (1, bool, "--a.b=1: expected true or false"),
        (2.5, int, "--a.b=2.5: expected a whole number"),
        ("nevr", Mode, "--a.b=nevr: expected one of auto, never. Did you mean never?"),
        ([1, "x"], tuple[float, ...], r"--a.b=\[1, x\]: expected a list of numbers"),
        (3, tuple[float, ...], "--a.b=3: expected a list of numbers"),
    ],
)
def test_what_does_not_fit_is_one_line(value: Any, hint: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as refusal:
        checked("a.b", value, hint)
    assert "\n" not in str(refusal.value)


def test_values_and_hints_are_written_as_people_write_them() -> None:
    assert written((True, None, 0.5, "x")) == "[true, null, 0.5, x]"
    assert describe(int | Mode | None) == "a whole number or one of auto, never or null"
