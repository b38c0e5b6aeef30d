"""The bootstrap against one that resamples, and McNemar's test by hand."""

import numpy as np
import pytest
from scipy.stats import binom, bootstrap

from lockstep.evaluation.chance import bootstrap_interval, mcnemar, pair


def test_the_interval_is_that_of_resampled_values() -> None:
    values = np.random.default_rng(2).choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=400)
    got = bootstrap_interval(values)
    found = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=3, vectorized=True, batch=1000)
    assert got == pytest.approx((found.confidence_interval.low, found.confidence_interval.high), abs=0.004)
    assert got[0] < values.mean() < got[1]


def test_the_interval_of_an_accuracy_is_the_binomial_one() -> None:
    right = np.arange(50_000) < 38_000
    got = bootstrap_interval(right)
    assert got == pytest.approx(binom.ppf([0.025, 0.975], 50_000, 0.76) / 50_000, abs=2e-4)
    assert got == bootstrap_interval(right[::-1])
    assert bootstrap_interval(np.ones(5, bool)) == (1.0, 1.0)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64, rel=1e-12) == mcnemar(5, 1)  # of 2^6 throws
    assert mcnemar(12, 30) == pytest.approx(2 * binom.cdf(12, 42, 0.5), rel=1e-12)  # as statsmodels has it


def test_pairs_by_hand() -> None:
    first = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 1], bool)
    second = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1], bool)
    found = pair(first, second)
    assert (found.samples, found.first, found.second) == (10, 0.6, 0.8)
    assert (found.only_first, found.only_second) == (1, 3)
    assert found.p == pytest.approx(2 * (1 + 4) / 16, rel=1e-12)
    assert found.interval == bootstrap_interval(np.array([0, 0, -1, 0, 1, 1, 1, 0, 0, 0]))
    assert found.interval[0] == pytest.approx(-0.2, abs=0.11) and found.interval[1] == pytest.approx(0.6, abs=0.11)
