"""How much of a result is chance: the bootstrap, and McNemar's test of two networks on the same samples."""

from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_SEED = 0


def bootstrap_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (N,), from 10,000 resamples of N values; Efron, 1979.

    Of values that are few and distinct, such as right or wrong, a resample is a draw of how often each occurs, from
    one multinomial distribution. The same values give the same interval.
    """
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(_SEED).multinomial(len(values), counts / len(values), _RESAMPLES)
    low, high = np.quantile(drawn @ distinct / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """p of McNemar's exact test, two-sided: that as many samples are right in one alone as in the other alone.

    Of the samples that one network alone has right, each is a fair coin's throw under that hypothesis; McNemar, 1947.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


@dataclass(frozen=True)
class Paired:
    """Two networks on the same samples."""

    samples: int
    first: float
    """Accuracy"""
    second: float
    only_first: int
    """Samples that the first network alone has right"""
    only_second: int
    interval: tuple[float, float]
    """95 % of second - first, by bootstrap over the samples"""
    p: float
    """McNemar's"""


def pair(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compare which samples two networks have right, bool (N,) each."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    interval = bootstrap_interval(second.astype(int) - first.astype(int))
    means = float(first.mean()), float(second.mean())
    return Paired(len(first), *means, only_first, only_second, interval, mcnemar(only_first, only_second))
