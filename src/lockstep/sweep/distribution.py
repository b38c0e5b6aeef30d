"""What a parameter of a W&B sweep file may be: a value, a list of values, or one of W&B's distributions.

The formulas, defaults and keys are those of W&B's own implementation (https://github.com/wandb/sweeps): `log_uniform`
takes the exponents, `log_uniform_values` the values themselves, `inv_log_uniform` is 1 / x of a log_uniform x, and a
`q_` rounds to multiples of `q`.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lockstep.errors import UserError, did_you_mean

Given = dict[str, Any]
"""Key of the file -> value"""


class Distribution(NamedTuple):
    """How a number is drawn, and the keys that say from where."""

    draw: Callable[[random.Random, Given], float]
    required: tuple[str, ...] = ()
    defaults: dict[str, float] = {}


def _between(change: Callable[[float], float], back: Callable[[float], float]) -> Distribution:
    """`back` of a number that is uniform between the changed `min` and `max`."""
    return Distribution(lambda r, given: back(r.uniform(change(given["min"]), change(given["max"]))), ("min", "max"))


def _same(value: float) -> float:
    return value


_NORMAL = {"mu": 0.0, "sigma": 1.0}
_PLAIN = {
    "uniform": _between(_same, _same),
    "log_uniform": _between(_same, math.exp),
    "log_uniform_values": _between(math.log, math.exp),
    "normal": Distribution(lambda r, given: r.gauss(given["mu"], given["sigma"]), defaults=_NORMAL),
    "log_normal": Distribution(lambda r, given: math.exp(r.gauss(given["mu"], given["sigma"])), defaults=_NORMAL),
    "beta": Distribution(lambda r, given: r.betavariate(given["a"], given["b"]), defaults={"a": 1.0, "b": 1.0}),
}


def _quantised(plain: Distribution) -> Distribution:
    return Distribution(
        lambda r, given: _rounded(plain.draw(r, given), given["q"]), plain.required, {**plain.defaults, "q": 1.0}
    )


def _rounded(value: float, q: float) -> float:
    """The nearest multiple of `q`; a whole number if `q` is one, without the noise of 3 * 0.1 if it is not."""
    multiple = round(value / q)
    return multiple * int(q) if float(q).is_integer() else round(multiple * q, max(0, -math.floor(math.log10(q))) + 1)


DISTRIBUTIONS = {
    "int_uniform": Distribution(lambda r, given: r.randint(given["min"], given["max"]), ("min", "max")),
    **_PLAIN,
    **{f"q_{name}": _quantised(plain) for name, plain in _PLAIN.items()},
    "inv_log_uniform": _between(_same, lambda exponent: math.exp(-exponent)),
    "inv_log_uniform_values": _between(lambda value: -math.log(value), lambda exponent: math.exp(-exponent)),
}
_CONSTANT, _CATEGORICAL = "constant", ("categorical", "categorical_w_probabilities")
_SIGNIFICANT_DIGITS = 6
MOST_VALUES = 10_000
"""Of a parameter in a grid"""


def choices(given: Given) -> Sequence[Any]:
    """The values of a parameter in a grid; UserError where they are not to be listed.

    Beside `value` and `values` these are the whole numbers of int_uniform and, without its end, as in W&B, the
    multiples of q_uniform.
    """
    kind = _kind(given)
    if kind == _CONSTANT:
        return [given["value"]]
    if kind in _CATEGORICAL:
        _require("probabilities" not in given, "probabilities have no meaning in a grid")
        return _values(given)
    if kind not in ("int_uniform", "q_uniform"):
        raise UserError("needs `values` (a list) in a grid")
    limits = _limits(kind, given)
    if kind == "int_uniform":
        return range(limits["min"], limits["max"] + 1)
    count = math.ceil((limits["max"] - limits["min"]) / limits["q"] - 1e-9)
    if count > MOST_VALUES:
        raise UserError(f"{count} values are too many (at most {MOST_VALUES}): raise q")
    return [_short(limits["min"] + index * limits["q"]) for index in range(count)]


def drawn(given: Given) -> Callable[[random.Random], Any]:
    """What draws a value of a parameter; UserError for what W&B would not take.

    Numbers have six digits, so that they can be read and typed; values of a list are as they stand there.
    """
    kind = _kind(given)
    if kind == _CONSTANT:
        return lambda generator: given["value"]
    if kind in _CATEGORICAL:
        values, weights = _values(given), given.get("probabilities")
        return lambda generator: generator.choices(values, weights)[0]
    limits = _limits(kind, given)

    def draw(generator: random.Random) -> float:
        try:
            return _short(DISTRIBUTIONS[kind].draw(generator, limits))
        except (ValueError, OverflowError, ZeroDivisionError) as problem:
            raise UserError(f"{kind} does not go with {_shown(given)} ({problem})") from problem

    return draw


def most_values(given: Given) -> float:
    """How many different values can be drawn: infinitely many where it is a number."""
    if "value" in given:
        return 1
    return len(given["values"]) if isinstance(given.get("values"), list) else math.inf


def _kind(given: Given) -> str:
    kind = given.get("distribution")
    if kind is None:
        whole = all(isinstance(given.get(key), int) for key in ("min", "max"))
        by_key = {"value": _CONSTANT, "values": _CATEGORICAL[0], "min": "int_uniform" if whole else "uniform"}
        kind = next((name for key, name in by_key.items() if key in given), None)
        if kind is None:
            raise UserError("needs `value`, `values`, or `min` and `max`")
    known = [_CONSTANT, *_CATEGORICAL, *DISTRIBUTIONS]
    if not isinstance(kind, str) or kind not in known:
        hope = did_you_mean(str(kind), known)
        raise UserError(f"distribution {kind} is not one of {', '.join(known)}.{hope}".rstrip("."))
    for key in given:
        allowed = _keys(kind)
        _require(key in (*allowed, "distribution"), f"{kind} takes {', '.join(allowed)}, not {key}")
    _require(kind != _CONSTANT or "value" in given, "constant needs `value`")
    return kind


def _keys(kind: str) -> tuple[str, ...]:
    if kind == _CONSTANT:
        return ("value",)
    if kind in _CATEGORICAL:
        return ("values", "probabilities")
    return (*DISTRIBUTIONS[kind].required, *DISTRIBUTIONS[kind].defaults)


def _values(given: Given) -> list[Any]:
    values, weights = given.get("values"), given.get("probabilities")
    if not isinstance(values, list) or not values:
        raise UserError("needs `values`, a list that is not empty")
    if weights is not None:
        usable = isinstance(weights, list) and len(weights) == len(values) and all(map(_is_number, weights))
        _require(usable and min(weights) >= 0, "probabilities must be as many numbers from 0 on as there are values")
        _require(abs(sum(weights) - 1) < 1e-6, f"probabilities must add up to 1, not {sum(weights):g}")
    return values


def _limits(kind: str, given: Given) -> Given:
    """The numbers of a distribution, defaults filled in, each checked."""
    distribution = DISTRIBUTIONS[kind]
    for key in distribution.required:
        _require(key in given, f"{kind} does not go with {_shown(given)}: it needs `{key}`")
    limits = {**distribution.defaults, **{key: value for key, value in given.items() if key != "distribution"}}
    for key, value in limits.items():
        _require(_is_number(value), f"{key} must be a number, not {value!r}")
        _require(kind != "int_uniform" or isinstance(value, int), f"{key} must be a whole number, not {value!r}")
    _require(limits.get("min", 0) <= limits.get("max", math.inf), f"min {given.get('min')} is above max")
    _require(not kind.endswith("_values") or limits["min"] > 0, f"min must be above 0 for {kind}")
    for key in ("q", "a", "b"):
        _require(limits.get(key, 1) > 0, f"{key} must be above 0")
    _require(limits.get("sigma", 0) >= 0, "sigma must not be negative")
    return limits


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def _shown(given: Given) -> str:
    return ", ".join(f"{key}: {value}" for key, value in given.items())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
