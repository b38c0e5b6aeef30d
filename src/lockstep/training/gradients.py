"""The one order in which numbers of microbatches are summed."""

from collections.abc import Sequence


def tree_sum(values: Sequence[float]) -> float:
    """The sum of one number per microbatch: neighbours first, then neighbouring sums, and so on; 0 of nothing."""
    level = list(values) or [0.0]
    while len(level) > 1:
        pairs = [left + right for left, right in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]
