"""What a setting's value may be: checked against the type hint of its field, in words a user knows."""

import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from lockstep.errors import UserError, did_you_mean


def checked(setting: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` has it (whole numbers as floats, lists as tuples); raises UserError naming `setting`.

    A hint is bool, int, float, str, None, a Literal of texts, tuple[X, ...], or a union of such. inf and NaN are no
    numbers here.
    """
    options = options_of(hint)
    for option in options:
        fits, typed = _fit(value, option)
        if fits:
            return typed
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    hope = did_you_mean(str(value), choices) if isinstance(value, str) else ""
    raise UserError(f"--{setting}={written(value)}: expected {describe(hint)}.{hope}".rstrip("."))


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
        return math.isfinite(number), number
    return isinstance(value, hint), value


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


def written(value: Any) -> str:
    """A value as a command line or a recipe has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(written, value))}]" if isinstance(value, list | tuple) else str(value)
