"""Early termination: W&B's own examples, and decisions worked out by hand."""

import math
from typing import Any

import pytest

from lockstep.errors import UserError
from lockstep.sweep.hyperband import Hyperband, read_hyperband


def hyperband(maximize: bool = False, **given: Any) -> Hyperband:
    found = read_hyperband({"type": "hyperband", **given}, maximize=maximize)
    assert found is not None
    return found


def now(*names: str) -> dict[str, int]:
    """The runs to judge, as if there had been a look after each validation but the last."""
    return dict.fromkeys(names, 1000)


def test_brackets_are_those_of_wandbs_documentation() -> None:
    assert hyperband(max_iter=27, s=2).brackets == (3, 9)
    assert hyperband(min_iter=3).brackets[:4] == (3, 9, 27, 81)
    assert hyperband(max_iter=5, eta=2, s=2).brackets == (1, 2)
    assert hyperband(max_iter=10, s=1000).brackets == (1, 3)


def test_the_example_of_wandbs_implementation() -> None:
    """At bracket 2 the values are 9, 10, 8, 7, 6: of the best half the worst is 8, which c reaches and b does not."""
    histories = {"a": [10, 9], "b": [10, 10], "c": [10, 8, 8], "d": [10, 7, 7], "e": [10, 6, 6]}
    assert hyperband(max_iter=5, eta=2, s=2).losers(histories, now("b", "c", "d")) == {"b": 2}


def test_nobody_is_judged_before_a_bracket_or_alone() -> None:
    judge = hyperband(maximize=True, min_iter=2, eta=2)
    assert judge.losers({"a": [0.1], "b": [0.9, 0.9]}, now("a", "b")) == {}
    assert judge.losers({"a": [0.1, 0.1]}, now("a")) == {} and judge.losers({"a": []}, now("a")) == {}


def test_maximize_and_a_third() -> None:
    """At 0.9, 0.8 and 0.7 the threshold of eta 3 is the second best, as W&B counts: 0.8."""
    histories = {"a": [0.7], "b": [0.9], "c": [0.8]}
    assert hyperband(maximize=True, min_iter=1).losers(histories, now("a", "b", "c")) == {"a": 1}
    assert hyperband(maximize=False, min_iter=1).losers(histories, now("a", "b", "c")) == {"b": 1}


def test_strict_judges_the_value_at_the_bracket_and_else_the_best_ever() -> None:
    histories = {"a": [0.9, 0.1], "b": [0.2, 0.5], "c": [0.2, 0.6]}
    assert hyperband(maximize=True, min_iter=2, eta=2).losers(histories, now("a", "b")) == {}
    assert hyperband(maximize=True, min_iter=2, eta=2, strict=True).losers(histories, now("a", "b")) == {"a": 2}


def test_the_latest_bracket_counts() -> None:
    """The threshold of bracket 1 is 0.4, that of bracket 2 is 0.7: `a` has caught up."""
    histories = {"a": [0.3, 0.9], "b": [0.5, 0.6], "c": [0.6, 0.7], "d": [0.2], "e": [0.4]}
    assert hyperband(maximize=True, min_iter=1, eta=2).losers(histories, now("a", "b", "d")) == {"b": 2, "d": 1}


def test_a_quick_run_passes_no_bracket_unseen() -> None:
    """It alone has reached brackets 2 and 4, but at 1 it was behind; a look then would have stopped it."""
    histories = {"a": [0.1] * 4, "b": [0.5], "c": [0.6]}
    judge = hyperband(maximize=True, min_iter=1, eta=2)
    assert judge.losers(histories, {"a": 0}) == {"a": 1} and judge.losers(histories, {"a": 4}) == {}


def test_what_is_not_finite_does_not_count() -> None:
    judge = hyperband(min_iter=2, eta=2)
    assert judge.losers({"a": [math.nan, 1.0], "b": [0.1, 0.1]}, now("a")) == {}
    assert judge.losers({"a": [math.nan, 1.0, 1.0], "b": [0.1, 0.1], "c": [0.1, 0.2]}, now("a")) == {"a": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "median"}, "type: hyperband"),
        ("hyperband", "type: hyperband"),
        ({"type": "hyperband"}, "needs min_iter"),
        ({"type": "hyperband", "max_iter": 9}, "max_iter needs s"),
        ({"type": "hyperband", "max_iter": 2, "s": 2}, "leaves no bracket"),
        ({"type": "hyperband", "min_iter": 0}, "min_iter must be a whole number from 1"),
        ({"type": "hyperband", "min_iter": "3"}, "min_iter must be a whole number"),
        ({"type": "hyperband", "min_iter": 3, "eta": 1}, "eta must be a number above 1"),
        ({"type": "hyperband", "min_iter": 3, "strict": "yes"}, "strict must be true or false"),
        ({"type": "hyperband", "min_iter": 3, "etta": 3}, "takes .*, not etta"),
    ],
)
def test_what_wandb_would_not_take_is_one_line(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_hyperband(given, maximize=True)
