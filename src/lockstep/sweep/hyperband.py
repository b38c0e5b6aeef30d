"""Early termination as W&B has it (`early_terminate: {type: hyperband, ...}`), decided here.

The validations of a run are its iterations. At each bracket a run must be among the best 1/eta of those that have come
so far (Li et al. 2018, https://arxiv.org/abs/1603.06560, in the one-sided form of W&B's
https://github.com/wandb/sweeps): the others' values at the bracket give a threshold, which the run has to reach with
the best value that it has ever had, or with `strict` with its own value at the bracket.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.errors import UserError

_LARGEST_BRACKET = 1e9  # of min_iter, which has no last one


@dataclass(frozen=True)
class Hyperband:
    """When runs are judged, and by what."""

    brackets: tuple[int, ...]
    """Numbers of validations, ascending"""
    eta: float
    strict: bool
    maximize: bool

    def losers(self, histories: Mapping[str, Sequence[float]], running: Mapping[str, int]) -> dict[str, int]:
        """Which runs should stop, and the bracket that each failed.

        `histories` has the metric after every validation of all runs of the sweep, the ended ones too; values that are
        not finite do not count. `running` has the runs to judge, and how many validations each had at the last look:
        it is judged as if somebody had looked after each one since, so that a quick run passes no bracket unseen.
        """
        signed = {
            name: [-value if self.maximize else value for value in values if math.isfinite(value)]
            for name, values in histories.items()
        }
        failed = {}
        for name, looked_at in running.items():
            own = signed.get(name, [])
            for seen in range(min(looked_at, len(own)), len(own) + 1):
                if bracket := self._failed(own[:seen], signed.values()):
                    failed[name] = bracket
                    break
        return failed

    def _failed(self, own: Sequence[float], all_runs: Collection[Sequence[float]]) -> int | None:
        """The last bracket of a run if it has failed it."""
        bracket = max((bracket for bracket in self.brackets if bracket <= len(own)), default=None)
        if bracket is None:
            return None
        value = own[bracket - 1] if self.strict else min(own)
        return bracket if value > self._threshold(all_runs, bracket) else None

    def _threshold(self, histories: Collection[Sequence[float]], bracket: int) -> float:
        at_bracket = sorted(values[bracket - 1] for values in histories if len(values) >= bracket)
        return at_bracket[int(len(at_bracket) / self.eta)]


def read_hyperband(given: Any, *, maximize: bool) -> Hyperband | None:
    """What `early_terminate` says; None if nothing. UserError for what W&B would not take."""
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") != "hyperband":
        raise UserError("early_terminate takes `type: hyperband`, with min_iter, or with max_iter and s")
    known = ("type", "min_iter", "max_iter", "s", "eta", "strict")
    for key in given:
        if key not in known:
            raise UserError(f"early_terminate takes {', '.join(known)}, not {key}")
    eta, strict = given.get("eta", 3), given.get("strict", False)
    if not _is_number(eta) or eta <= 1:
        raise UserError(f"early_terminate: eta must be a number above 1, not {eta!r}")
    if not isinstance(strict, bool):
        raise UserError(f"early_terminate: strict must be true or false, not {strict!r}")
    return Hyperband(_brackets(given, eta), eta, strict, maximize)


def _brackets(given: dict[str, Any], eta: float) -> tuple[int, ...]:
    """Of max_iter 27, s 2 and eta 3: 3, 9. Of min_iter 3: 3, 9, 27 and so on."""
    brackets: list[int] = []
    for key in ("min_iter", "max_iter", "s"):
        if key in given and (not _is_number(given[key]) or int(given[key]) != given[key] or given[key] < 1):
            raise UserError(f"early_terminate: {key} must be a whole number from 1 on, not {given[key]!r}")
    if "max_iter" in given:
        if "s" not in given:
            raise UserError("early_terminate: max_iter needs s, the number of brackets before it")
        bracket = given["max_iter"] / eta
        while bracket >= 1 and len(brackets) < given["s"]:
            brackets.append(int(bracket))
            bracket /= eta
        if not brackets:
            raise UserError("early_terminate: max_iter leaves no bracket: raise it, or lower eta")
        return tuple(sorted(brackets))
    if "min_iter" not in given:
        raise UserError("early_terminate needs min_iter, or max_iter and s")
    bracket = given["min_iter"]
    while bracket < _LARGEST_BRACKET:
        brackets.append(int(bracket))
        bracket *= eta
    return tuple(brackets)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
