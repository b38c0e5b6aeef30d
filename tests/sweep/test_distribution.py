"""Values of W&B's distributions, against SciPy's; and what a grid lists."""

import math
import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lockstep.errors import UserError
from lockstep.sweep.distribution import DISTRIBUTIONS, choices, drawn, most_values

LOG = {"min": math.log(0.001), "max": math.log(0.1)}
VALUES = {"min": 0.001, "max": 0.1}
KNOWN: dict[str, tuple[dict[str, float], Any]] = {
    "uniform": ({"min": -2, "max": 3.5}, stats.uniform(-2, 5.5)),
    "log_uniform": (LOG, stats.loguniform(0.001, 0.1)),
    "log_uniform_values": (VALUES, stats.loguniform(0.001, 0.1)),
    "inv_log_uniform": (LOG, stats.loguniform(10, 1000)),
    "inv_log_uniform_values": (VALUES, stats.loguniform(0.001, 0.1)),
    "normal": ({"mu": 2, "sigma": 0.5}, stats.norm(2, 0.5)),
    "log_normal": ({"mu": 1, "sigma": 0.5}, stats.lognorm(0.5, scale=math.e)),
    "beta": ({"a": 2, "b": 5}, stats.beta(2, 5)),
}


def draws(count: int, **given: Any) -> list[Any]:
    generator = random.Random(0)
    draw = drawn(given)
    return [draw(generator) for _ in range(count)]


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_are_distributed_as_scipys(name: str) -> None:
    limits, expected = KNOWN[name]
    assert stats.kstest(draws(4000, distribution=name, **limits), expected.cdf).pvalue > 0.01


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name.startswith("q_")])
def test_q_rounds_the_same_draws_to_multiples(name: str) -> None:
    limits, _ = KNOWN[name.removeprefix("q_")]
    plain = draws(300, distribution=name.removeprefix("q_"), **limits)
    rounded = draws(300, distribution=name, q=0.05, **limits)
    assert max(abs(np.array(rounded) - plain)) <= 0.025 + 1e-5, "the nearest; plain ones have six digits"
    assert np.array(rounded) / 0.05 == pytest.approx(np.round(np.array(rounded) / 0.05))
    assert max(len(str(value)) for value in rounded) <= 5, "0.15, not 0.15000000000000002"
    assert all(isinstance(value, int) for value in draws(9, distribution=name, **limits)), "q is 1 by default"


def test_every_distribution_was_tried() -> None:
    assert {name.removeprefix("q_") for name in DISTRIBUTIONS} == {*KNOWN, "int_uniform"}


def test_without_a_name_the_keys_tell_the_distribution() -> None:
    assert set(draws(100, min=2, max=4)) == {2, 3, 4}
    assert all(isinstance(value, float) and 2 <= value <= 4 for value in draws(100, min=2, max=4.0))
    assert set(draws(100, values=["a", None])) == {"a", None} and draws(1, value=7) == [7]
    skewed = draws(1000, values=[0, 1], probabilities=[0.9, 0.1])
    assert 0.07 < np.mean(skewed) < 0.13
    assert np.std(draws(1000, distribution="normal")) == pytest.approx(1, abs=0.1), "mu 0, sigma 1 by default"
    assert draws(1, min=1 / 3, max=1 / 3) == [0.333333]


def test_a_grid_lists_values_and_what_can_be_counted() -> None:
    assert choices({"values": ["b", "a"]}) == ["b", "a"] and choices({"value": None}) == [None]
    assert list(choices({"min": 2, "max": 4})) == [2, 3, 4]
    given = {"distribution": "q_uniform", "min": 0.1, "max": 0.4, "q": 0.1}
    assert choices(given) == [0.1, 0.2, 0.3], "W&B leaves the end out"
    assert most_values({"values": [1, 2]}) == 2 and most_values({"min": 0, "max": 1}) == math.inf


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs `value`"),
        ({"values": []}, "needs `values`, a list"),
        ({"values": "ab"}, "needs `values`, a list"),
        ({"values": [1], "probabilities": [0.5, 0.5]}, "as many numbers"),
        ({"values": [1, 2], "probabilities": [0.5, "x"]}, "as many numbers"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "must add up to 1, not 1.1"),
        ({"min": 1, "max": 0}, "min 1 is above max"),
        ({"min": 1}, "int_uniform|uniform does not go with min: 1: it needs `max`"),
        ({"min": "a", "max": 2}, "min must be a number, not 'a'"),
        ({"min": 1, "max": math.inf}, "max must be a number"),
        ({"min": 1, "max": 2, "mu": 3}, "int_uniform takes min, max, not mu"),
        ({"distribution": "int_uniform", "min": 1, "max": 2.5}, "max must be a whole number"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min must be above 0"),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}, "q must be above 0"),
        ({"distribution": "normal", "sigma": -1}, "sigma must not be negative"),
        ({"distribution": "log_unifrom", "min": 0, "max": 1}, "log_unifrom is not one of .* Did you mean log_uniform"),
        ({"distribution": ["a"], "min": 0, "max": 1}, "is not one of"),
        ({"distribution": "constant", "value": 1, "values": [1]}, "constant takes value, not values"),
    ],
)
def test_what_wandb_would_not_take_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        drawn(given)


def test_a_number_too_large_to_hold() -> None:
    with pytest.raises(UserError, match="log_normal does not go with"):
        draws(1, distribution="log_normal", mu=1000)
