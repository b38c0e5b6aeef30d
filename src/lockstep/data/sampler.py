"""Which samples make which microbatch: pure functions of (seed, epoch, position).

The order is never stored. A keyed bijection maps position to sample index: a Feistel network over the smallest power
of two that holds the data set, walked until the value falls inside it (Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"). So any position of any epoch is reached at once, at any number of samples and processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lockstep.errors import UserError
from lockstep.randomness import mix_array, mix_seed
from lockstep.settings.config import Config

# Half rounds of the Feistel network. Four give a permutation that looks random to a bounded observer (Luby and
# Rackoff 1988), but domains of a few bits need more: with 16, all orders of 3 and 4 samples are equally frequent.
_HALF_ROUNDS = 16
_ODD = np.uint64(0xD1342543DE82EF95)  # spreads a half over 64 bits: neighbouring halves and rounds share no hash input
_BLOCK_SAMPLES = 16_384


def permute(positions: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | int) -> np.ndarray:
    """Map each position (int64, 0 <= position < size) to an index by the permutation of `size` that `key` names.

    Sizes and keys broadcast against positions, so one call can serve many permutations. Shape as positions, int64.
    """
    shape = np.broadcast_shapes(positions.shape, np.shape(sizes), np.shape(keys))
    values = np.broadcast_to(positions, shape).astype(np.uint64).ravel()
    limits = np.broadcast_to(np.asarray(sizes, np.uint64), shape).ravel()
    keys = np.broadcast_to(np.asarray(keys, np.uint64), shape).ravel()
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], limits[outside], keys[outside])
        outside = outside[values[outside] >= limits[outside]]
    return values.astype(np.int64).reshape(shape)


def _feistel(values: np.ndarray, limits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass over the power of two that holds each limit: each half is XORed in turn with a hash of the other."""
    bits = np.maximum(np.ceil(np.log2(np.maximum(limits, 2).astype(np.float64))), 2).astype(np.uint64)
    low_bits = bits >> np.uint64(1)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    low, high = values & low_mask, values >> low_bits
    for half_round in range(0, _HALF_ROUNDS, 2):
        low ^= (mix_array(keys + high * _ODD + np.uint64(half_round)) >> np.uint64(32)) & low_mask
        high ^= (mix_array(keys + low * _ODD + np.uint64(half_round + 1)) >> np.uint64(32)) & high_mask
    return (high << low_bits) | low


class Microbatch(NamedTuple):
    """The samples of one forward/backward: indices into the training set, int64 (micro_batch_size,)."""

    epoch: int
    step: int
    number: int
    samples: np.ndarray
    repeats: np.ndarray


@dataclass(frozen=True)
class Sampler:
    """The global order of training. Has no state: every method is a function of its arguments."""

    num_samples: int
    batch_size: int
    micro_batch_size: int
    seed: int
    repeats: int = 1
    class_samples: tuple[np.ndarray, ...] = field(default=(), repr=False)
    """Sample indices by class for class-balanced sampling; empty: every sample once per epoch"""

    def __post_init__(self) -> None:
        if self.num_samples < self.batch_size:
            raise UserError(
                f"the training set has {self.num_samples} samples, fewer than one step needs: "
                f"lower --train.batch_size={self.batch_size}"
            )
        assert self.batch_size % self.micro_batch_size == 0 and self.batch_size % self.repeats == 0

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    @property
    def microbatches_per_step(self) -> int:
        return self.batch_size // self.micro_batch_size

    def microbatch(self, step: int, number: int) -> Microbatch:
        """Microbatch `number` of a step: the same samples in the same order, whichever process asks."""
        return next(self.microbatches(range(step, step + 1), range(number, number + 1)))

    def microbatches(self, steps: range, numbers: range) -> Iterator[Microbatch]:
        """The microbatches with these numbers, step by step; a first one far into training costs no more than any."""
        # Many steps at a time, because a permutation of 256 positions costs as much as one of 4,096.
        block = max(1, _BLOCK_SAMPLES // (len(numbers) * self.micro_batch_size))
        for start in range(0, len(steps), block):
            block_steps = np.array(steps[start : start + block])
            samples, repeats = self._draw(block_steps, np.array(numbers))
            for i, step in enumerate(block_steps.tolist()):
                for j, number in enumerate(numbers):
                    yield Microbatch(step // self.steps_per_epoch, step, number, samples[i, j], repeats[j])

    def _draw(self, steps: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples (steps, numbers, micro_batch_size) and repeats (numbers, micro_batch_size)."""
        slots = numbers[:, None] * self.micro_batch_size + np.arange(self.micro_batch_size)
        # Copies of a repeated sample stand a part of the global batch apart, mostly in different microbatches.
        distinct = self.batch_size // self.repeats
        epochs, steps_in_epoch = np.divmod(steps[:, None, None], self.steps_per_epoch)
        draws = steps_in_epoch * distinct + slots % distinct
        samples = self._balanced(epochs, draws) if self.class_samples else self._shuffled(epochs, draws)
        return samples, slots // distinct

    def _keys(self, epochs: np.ndarray, purpose: int) -> np.ndarray:
        return mix_array(epochs.astype(np.uint64) + np.uint64(mix_seed(self.seed, purpose)))

    def _shuffled(self, epochs: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return permute(draws, self.num_samples, self._keys(epochs, 0))

    def _balanced(self, epochs: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Each run of as many draws as classes holds every class once; a class goes through its samples in turn."""
        sizes = np.array([len(samples) for samples in self.class_samples])
        rounds, places = np.divmod(draws, len(sizes))
        classes = permute(places, len(sizes), mix_array(rounds.astype(np.uint64) + self._keys(epochs, 1)))
        passes, turns = np.divmod(rounds, sizes[classes])
        keys = mix_array(mix_array(passes.astype(np.uint64) + self._keys(epochs, 2)) + classes.astype(np.uint64))
        starts = np.cumsum(sizes) - sizes
        return np.concatenate(self.class_samples)[starts[classes] + permute(turns, sizes[classes], keys)]


def build_sampler(config: Config, labels: np.ndarray, micro_batch_size: int) -> Sampler:
    """The sampler of a training set with these labels, int (N,); negative labels (skipped images) stay in the order."""
    class_samples: tuple[np.ndarray, ...] = ()
    if config.data.sampling == "balanced":
        class_samples = tuple(np.flatnonzero(labels == c) for c in np.unique(labels[labels >= 0]))
    return Sampler(
        num_samples=len(labels),
        batch_size=config.train.batch_size,
        micro_batch_size=micro_batch_size,
        seed=config.run.seed,
        repeats=config.data.repeats,
        class_samples=class_samples,
    )


def block_of(process: int, processes: int, microbatches: int) -> range:
    """Numbers of the microbatches of a process: contiguous blocks, whose sizes differ by one at most."""
    return range(process * microbatches // processes, (process + 1) * microbatches // processes)


def resolve_micro_batch_size(config: Config, num_processes: int, kept: int | None = None) -> int:
    """The samples of one forward/backward; for auto, the most that it may be.

    Where the setting leaves it open, `kept`, that of an earlier start of the run, counts, else one microbatch for each
    process. Raises UserError with numbers that fit where these do not: a process needs a microbatch.
    """
    batch_size, micro_batch_size = config.train.batch_size, config.train.micro_batch_size
    given = micro_batch_size if isinstance(micro_batch_size, int) else kept
    if given is None and batch_size % num_processes and batch_size > num_processes:
        nearest = sorted(_divisors(batch_size), key=lambda n: abs(n - num_processes))[:2]
        raise UserError(
            f"--train.batch_size={batch_size} is not a multiple of {num_processes} processes: set "
            f"--train.micro_batch_size (then any number of processes up to batch_size / micro_batch_size will do), or "
            f"launch {' or '.join(map(str, sorted(nearest)))} processes"
        )
    micro = given or max(1, batch_size // num_processes)
    microbatches = batch_size // micro
    if microbatches < num_processes:
        raise UserError(
            f"a step has {microbatches} microbatch{'es' * (microbatches > 1)} (--train.batch_size={batch_size} / "
            f"micro_batch_size {micro}), which is too few for {num_processes} processes: launch at most {microbatches}"
            + (f", or set micro_batch_size to {_largest_fitting(batch_size, num_processes)}" if given else "")
        )
    if micro == 1 and (config.augment.mixup or config.augment.cutmix):
        raise UserError(
            "--augment.mixup and --augment.cutmix mix the images of a microbatch, and it has one only: raise "
            "--train.micro_batch_size=1"
        )
    if config.runtime.static_graph and microbatches > num_processes:  # torch 2.15 fails an assertion
        raise UserError("--runtime.static_graph=true does not go with accumulation: leave one of them out")
    return micro


def propose_micro_batch_size(batch_size: int, num_processes: int) -> int:
    """A microbatch with which these and other numbers of processes can train: 8 a step, if each has 32 samples then."""
    return _largest_fitting(batch_size, max(num_processes, min(8, batch_size // 32)))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _largest_fitting(batch_size: int, num_processes: int) -> int:
    """The largest microbatch of which a batch has one for each process."""
    return max((size for size in _divisors(batch_size) if batch_size // size >= num_processes), default=1)
