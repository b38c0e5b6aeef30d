"""How much of a result is chance: the bootstrap, and McNemar's test of two networks on the same samples."""

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
