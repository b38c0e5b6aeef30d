"""What a setting's value may be: checked against the type hint of its field, in words a user knows."""

import math
import reprlib
import types
from typing import Any, Literal, Union, get_args, get_origin

from lockstep.errors import UserError, did_you_mean

_LARGEST_WHOLE = 2**63 - 1
_LARGEST = 3.4e38
"""What 64 bits and a float32 hold"""
_MOST_SHOWN = 120


def checked(setting: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` has it (whole numbers as floats, lists as tuples); raises UserError naming `setting`.

    A hint is bool, int, float, str, None, a Literal of texts, tuple[X, ...], or a union of such. inf, NaN and what a
    float32 or 64 bits do not hold are no numbers here, and bytes that are no UTF-8 are no text.
    """
    options = options_of(hint)
    for option in options:
        fits, typed = _fit(value, option)
        if fits:
            return typed
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    hope = did_you_mean(str(value), choices) if isinstance(value, str) else ""
    raise UserError(f"--{setting}={_shown(value)}: expected {describe(hint)}.{hope}".rstrip("."))


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types of which a value must be one."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a value is of a type that is no union, and the value in that type."""
    if hint in (None, type(None)):
        return value is None, None
    if get_origin(hint) is Literal:
        return value in get_args(hint) and isinstance(value, str), value
    if get_origin(hint) is tuple:
        (item_hint, _) = get_args(hint)
        if not isinstance(value, list | tuple):
            return False, None
        items = [_fit(item, item_hint) for item in value]
        return all(fits for fits, _ in items), tuple(item for _, item in items)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool, value
    if hint is float and isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:  # a whole number of more than 308 digits
            return False, value
        return math.isfinite(number) and abs(number) <= _LARGEST, number
    if hint is int and isinstance(value, int):
        return abs(value) <= _LARGEST_WHOLE, value
    return isinstance(value, hint) and (hint is not str or _is_text(value)), value


def _is_text(value: str) -> bool:
    """Whether it can be written to a file and stand in a path."""
    try:
        return "\0" not in value and bool(value.encode() or True)
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
        return False


def is_name(value: str) -> bool:
    """Whether it can name a folder or a class wherever names are shown: text without control characters."""
    return _is_text(value) and value != "" and not any(ord(letter) < 32 or ord(letter) == 127 for letter in value)


def describe(hint: Any) -> str:
    """A type hint in words: `a number or null`, `one of auto, never, must`."""
    if len(options_of(hint)) > 1:
        return " or ".join(map(describe, options_of(hint)))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(hint) is tuple:
        return {float: "a list of numbers", int: "a list of whole numbers", str: "a list of words"}[get_args(hint)[0]]
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return names[hint]


def _shown(value: Any) -> str:
    """A value of any kind in a message; what is nested, or too long, in short."""
    if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        return f"(a number of {value.bit_length()} bits)"
    nested = isinstance(value, dict) or (isinstance(value, list | tuple) and not all(map(_is_plain, value)))
    text = reprlib.repr(value) if nested else written(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _is_plain(item: Any) -> bool:
    return isinstance(item, str | float | bool | None) or (isinstance(item, int) and abs(item) <= _LARGEST_WHOLE)


def written(value: Any) -> str:
    """A value as a command line or a recipe has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(written, value))}]" if isinstance(value, list | tuple) else str(value)
