"""Which validation is best, when training has stalled, and what survives as JSON."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lockstep.training.progress import BadSteps, Progress, Sums


def test_higher_accuracy_is_better_and_of_equals_the_later() -> None:
    progress = Progress()
    results = [(0.9, 0.5), (0.8, 0.5), (2.0, 0.6), (0.1, 0.5), (1.9, 0.6), (2.1, 0.6), (0.1, 0.59)]
    verdicts = []
    for step, (loss, accuracy) in enumerate(results, start=1):
        progress.step = step
        verdicts.append(progress.judge(step, loss, accuracy))
    assert verdicts == [True, True, True, False, True, True, False]
    assert (progress.best_step, progress.best_accuracy) == (6, 0.6)
    assert progress.validations == [(epoch, loss) for epoch, (loss, _) in enumerate(results, start=1)]


def test_even_a_hopeless_first_validation_is_the_best_so_far() -> None:
    progress = Progress(step=1)
    assert progress.judge(1, math.inf, 0.0) and progress.best_step == 1


def test_training_stalls_so_many_epochs_after_the_last_better_validation() -> None:
    progress = Progress()
    stalled = []
    for epoch, accuracy in enumerate((0.5, 0.4, 0.4, 0.6, 0.6, 0.5, 0.5), start=1):
        progress.judge(epoch, 1.0, accuracy)
        stalled.append(progress.has_stalled(3))
    assert stalled == [False, False, False, False, False, False, True]
    assert not progress.has_stalled(None) and not progress.has_stalled(4) and not Progress().has_stalled(1)


def test_weights_that_do_not_compete_are_not_the_best_and_start_no_patience() -> None:
    progress = Progress()
    results = {1: 1.0, 2: 0.5, 3: 0.6}
    verdicts = [progress.judge(epoch, 1.0, accuracy, competes=epoch > 2) for epoch, accuracy in results.items()]
    assert verdicts == [False, False, True] and progress.best_accuracy == 0.6
    assert not progress.has_stalled(1)


def test_progress_survives_as_json() -> None:
    progress = Progress(step=7, train_seconds=1.5, window=Sums([0.5, 0.25], 1, 2, 0), bad_steps=BadSteps(1, 2, 3))
    progress.judge(3, 0.3, 0.9)
    again = Progress.from_dict(json.loads(json.dumps(progress.as_dict())))
    assert again == progress and again.validations[0].loss == 0.3
    assert replace(progress, step=8) != progress
    assert Progress().validations is not Progress().validations


@pytest.mark.parametrize("damage", [{"window": [1]}, {"validations": [1]}, {"bad_steps": {"lost": 1}}, {"more": 1}])
def test_what_is_no_progress_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Progress.from_dict({**Progress().as_dict(), **damage})
