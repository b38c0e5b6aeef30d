"""The global order: complete, equal on every launch, reached at once anywhere, and shuffled like a true permutation."""

import itertools
import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lockstep.data.sampler import (
    Sampler,
    block_of,
    build_sampler,
    permute,
    propose_micro_batch_size,
    resolve_micro_batch_size,
)
from lockstep.settings.config import Config, DataConfig, RunConfig, RuntimeConfig, TrainConfig

# The statistics below use fixed seeds, so they always give the same result. A p-value this small would be a defect.
UNLIKELY = 1e-4


@st.composite
def samplers(draw: st.DrawFn, *, with_repeats: bool = False) -> Sampler:
    micro_batch_size = draw(st.integers(1, 24))
    repeats = draw(st.sampled_from((1, 2, 3, 4))) if with_repeats else 1
    batch_size = micro_batch_size * repeats * draw(st.integers(1, 8))
    num_samples = draw(st.integers(batch_size, 5000))
    return Sampler(num_samples, batch_size, micro_batch_size, draw(st.integers(0, 2**63)), repeats)


def epoch_samples(sampler: Sampler, epoch: int) -> np.ndarray:
    """Samples of an epoch in the global order, (steps, batch_size)."""
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    microbatches = sampler.microbatches(steps, range(sampler.microbatches_per_step))
    return np.concatenate([m.samples for m in microbatches]).reshape(len(steps), sampler.batch_size)


def permutations(num_samples: int, epochs: int, seed: int = 0) -> np.ndarray:
    """The orders of many epochs whose one step is the whole data set, (epochs, num_samples)."""
    sampler = Sampler(num_samples, num_samples, num_samples, seed)
    return np.stack([m.samples for m in sampler.microbatches(range(epochs), range(1))])


# ---- Completeness ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(samplers(), st.integers(0, 100))
def test_an_epoch_holds_every_sample_once_but_for_the_incomplete_last_batch(sampler: Sampler, epoch: int) -> None:
    samples = epoch_samples(sampler, epoch).ravel()
    assert len(samples) == sampler.num_samples // sampler.batch_size * sampler.batch_size
    assert len(set(samples.tolist())) == len(samples)
    assert samples.min() >= 0 and samples.max() < sampler.num_samples


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_of_any_size(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2**64 - 1)), min_size=1, max_size=8))
def test_permute_serves_many_permutations_in_one_call(named: list[tuple[int, int]]) -> None:
    positions = np.concatenate([np.arange(size) for size, _ in named])
    sizes = np.concatenate([np.full(size, size) for size, _ in named])
    keys = np.concatenate([np.full(size, key, np.uint64) for size, key in named])
    together = permute(positions, sizes, keys)
    assert together.dtype == np.int64
    alone = [permute(np.arange(size), size, key) for size, key in named]
    np.testing.assert_array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 2**31 - 1, 2**31, 2**40 + 1, 10**15])
def test_permute_stays_within_any_size(size: int) -> None:
    positions = np.unique(np.linspace(0, size - 1, 1000).astype(np.int64))
    indices = permute(positions, size, 7)
    assert indices.min() >= 0 and indices.max() < size and len(np.unique(indices)) == len(positions)


# ---- The same order on every launch ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(samplers(with_repeats=True), st.integers(0, 3), st.data())
def test_order_does_not_depend_on_processes_and_accumulation(sampler: Sampler, epoch: int, data: st.DataObject) -> None:
    per_step = sampler.microbatches_per_step
    processes = data.draw(st.sampled_from([n for n in range(1, per_step + 1) if per_step % n == 0]))
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)[:20]
    alone = list(sampler.microbatches(steps, range(per_step)))
    together = []
    for process in range(processes):
        together += sampler.microbatches(steps, range(process, per_step, processes))
    together.sort(key=lambda m: (m.step, m.number))
    assert len(alone) == len(together) == len(steps) * per_step
    for one, other in zip(alone, together, strict=True):
        assert (one.epoch, one.step, one.number) == (other.epoch, other.step, other.number)
        np.testing.assert_array_equal(one.samples, other.samples)
        np.testing.assert_array_equal(one.repeats, other.repeats)


@settings(deadline=None, max_examples=40)
@given(samplers(with_repeats=True), st.integers(0, 200), st.integers(1, 60))
def test_a_jump_equals_iterating(sampler: Sampler, first: int, count: int) -> None:
    numbers = range(sampler.microbatches_per_step)
    everything = list(sampler.microbatches(range(first + count), numbers))
    tail = list(sampler.microbatches(range(first, first + count), numbers))
    for one, other in zip(everything[first * len(numbers) :], tail, strict=True):
        assert one[:3] == other[:3]
        np.testing.assert_array_equal(one.samples, other.samples)
        assert len(one.samples) == sampler.micro_batch_size and one.samples.dtype == np.int64
    single = sampler.microbatch(first + count - 1, numbers[-1])
    np.testing.assert_array_equal(single.samples, tail[-1].samples)
    assert single.epoch == (first + count - 1) // sampler.steps_per_epoch


def test_blocks_of_steps_leave_no_seam() -> None:
    # 3 x 7 samples a step: the sampler draws hundreds of steps at a time and must not show where it does.
    sampler = Sampler(20_000, 21, 7, seed=5)
    drawn = list(sampler.microbatches(range(2000), range(3)))
    assert [(m.step, m.number) for m in drawn] == [(s, k) for s in range(2000) for k in range(3)]
    for step in (0, 259, 260, 779, 780, 781, 951, 952, 1999):
        np.testing.assert_array_equal(drawn[3 * step + 1].samples, sampler.microbatch(step, 1).samples)


def test_the_micro_batch_size_only_cuts_the_step() -> None:
    whole, halves = Sampler(500, 40, 40, seed=3), Sampler(500, 40, 20, seed=3)
    np.testing.assert_array_equal(epoch_samples(whole, 2), epoch_samples(halves, 2))


def test_epochs_and_seeds_differ() -> None:
    first = epoch_samples(Sampler(1000, 10, 10, seed=0), 0).ravel()
    for seed, epoch in itertools.product((0, 1, 2, 2**40), (0, 1, 2, 1000)):
        other = epoch_samples(Sampler(1000, 10, 10, seed=seed), epoch).ravel()
        same = int((first == other).sum())
        assert same == 1000 if (seed, epoch) == (0, 0) else same < 10


# ---- Repeats and balance ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(samplers(with_repeats=True), st.integers(0, 5))
def test_a_repeated_sample_is_repeated_within_its_global_batch(sampler: Sampler, epoch: int) -> None:
    numbers = range(sampler.microbatches_per_step)
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)[:30]
    chosen: set[int] = set()
    for step in steps:
        drawn = list(sampler.microbatches(range(step, step + 1), numbers))
        pairs = Counter((s, r) for m in drawn for s, r in zip(m.samples.tolist(), m.repeats.tolist(), strict=True))
        samples = {sample for sample, _ in pairs}
        assert set(pairs) == set(itertools.product(samples, range(sampler.repeats))) and set(pairs.values()) == {1}
        assert len(samples) == sampler.batch_size // sampler.repeats
        assert not samples & chosen
        chosen |= samples


@st.composite
def balanced_samplers(draw: st.DrawFn) -> Sampler:
    labels = np.array(draw(st.lists(st.integers(-1, 6), min_size=12, max_size=400)) + [0] * 20 + [3] * 2)
    config = Config(
        run=RunConfig(seed=draw(st.integers(0, 1000))),
        data=DataConfig(sampling="balanced"),
        train=TrainConfig(batch_size=draw(st.integers(1, 34))),
    )
    return build_sampler(config, labels, config.train.batch_size)


@settings(deadline=None, max_examples=40)
@given(balanced_samplers(), st.integers(0, 3))
def test_balanced_sampling_shows_every_class_equally_often(sampler: Sampler, epoch: int) -> None:
    class_of = {int(s): c for c, samples in enumerate(sampler.class_samples) for s in samples}
    order = epoch_samples(sampler, epoch).ravel().tolist()
    num_classes = len(sampler.class_samples)
    for start in range(0, len(order) - num_classes + 1, num_classes):
        window = {class_of[sample] for sample in order[start : start + num_classes]}
        assert len(window) == num_classes
    for number, samples in enumerate(sampler.class_samples):
        turns = [sample for sample in order if class_of[sample] == number]
        for start in range(0, len(turns), len(samples)):
            one_pass = turns[start : start + len(samples)]
            assert len(set(one_pass)) == len(one_pass), "a pass over a class repeated a sample before it was through"
        if len(turns) >= len(samples):
            assert set(turns[: len(samples)]) == set(samples.tolist())


def test_balanced_sampling_never_draws_a_skipped_image_and_reaches_all_of_the_largest_class() -> None:
    labels = np.array([0] * 150 + [1] * 5 + [2] * 10 + [-1] * 15)
    config = Config(data=DataConfig(sampling="balanced"), train=TrainConfig(batch_size=12))
    sampler = build_sampler(config, labels, 4)
    # An epoch has 60 turns of class 0, so 40 % of it; each epoch another part.
    seen = Counter(sample for epoch in range(40) for sample in epoch_samples(sampler, epoch).ravel().tolist())
    assert set(seen) == set(range(165))
    counts = [sum(seen[sample] for sample in np.flatnonzero(labels == c)) for c in range(3)]
    assert counts[0] == counts[1] == counts[2] == 40 * 60
    assert stats.chisquare([seen[sample] for sample in range(150)]).pvalue > UNLIKELY


def test_balanced_passes_and_epochs_are_shuffled_anew() -> None:
    labels = np.repeat([0, 1], (60, 6))
    config = Config(data=DataConfig(sampling="balanced"), train=TrainConfig(batch_size=66))
    sampler = build_sampler(config, labels, 66)
    order = np.concatenate([epoch_samples(sampler, epoch).ravel() for epoch in range(3)])
    small = order[order >= 60].tolist()
    passes = {tuple(small[start : start + 6]) for start in range(0, 30, 6)}
    assert len(passes) >= 4, "each pass over the small class should have its own order"
    classes = (order[: 2 * 33] >= 60).astype(int)[::2]
    assert 8 < classes.sum() < 25, "which class comes first within a window should vary"


def test_skipped_images_stay_in_the_order_of_shuffled_sampling() -> None:
    labels = np.arange(100) % 10
    config = Config(train=TrainConfig(batch_size=20))
    complete = epoch_samples(build_sampler(config, labels, 20), 1)
    labels[[3, 50]] = -1
    np.testing.assert_array_equal(epoch_samples(build_sampler(config, labels, 20), 1), complete)


# ---- Size ------------------------------------------------------------------------------------------------------------


def test_a_data_set_smaller_than_a_step_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"63 samples.*--train\.batch_size=64"):
        Sampler(63, 64, 8, seed=0)
    assert Sampler(64, 64, 8, seed=0).steps_per_epoch == 1


def test_a_billion_samples_on_4096_processes_start_anywhere_at_once_in_little_memory() -> None:
    sampler = Sampler(10**9, 4096 * 16, 16, seed=1)
    assert sampler.steps_per_epoch == 15_258
    slices: list[np.ndarray] = []
    tracemalloc.start()
    try:
        for step, process in itertools.product((0, 7_000, 15_257, 15_258 * 90 + 12_345), (0, 1, 2048, 4095)):
            start = time.process_time()
            microbatches = sampler.microbatches(range(step, 15_258 * 100), range(process, 4096, 4096))
            slices.append(np.concatenate([next(microbatches).samples for _ in range(10)]))
            assert time.process_time() - start < 1, "starting at a position must not depend on what came before"
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 50e6
    first_epoch = np.concatenate(slices[:8])  # steps 0-9 and 7,000-7,009 of one epoch, four processes
    assert len(np.unique(first_epoch)) == len(first_epoch) == 8 * 160
    everything = np.concatenate(slices)
    assert everything.min() >= 0 and everything.max() < 10**9
    assert stats.kstest(everything / 1e9, "uniform").pvalue > UNLIKELY


# ---- Shuffled like a true permutation --------------------------------------------------------------------------------


def pooled_chi_square(orders: np.ndarray, buckets: int) -> float:
    """p-value of the table (bucket of position, bucket of index) over permutations whose size the buckets divide.

    The table of a single random permutation has fixed margins, so its statistic is (n - 1) / n of the usual one.
    """
    count, size = orders.shape
    assert size % buckets == 0
    cells = np.arange(size) * buckets // size * buckets + orders * buckets // size
    observed = np.bincount(cells.ravel(), minlength=buckets**2)
    expected = count * size / buckets**2
    statistic = ((observed - expected) ** 2 / expected).sum() * (size - 1) / size
    return float(stats.chi2.sf(statistic, (buckets - 1) ** 2))


@pytest.mark.parametrize(
    ("size", "epochs", "buckets"), [(5, 4000, 5), (16, 2000, 16), (50, 2000, 50), (100, 1000, 20), (1000, 200, 25)]
)
def test_every_sample_is_equally_likely_at_every_position(size: int, epochs: int, buckets: int) -> None:
    p_value = pooled_chi_square(permutations(size, epochs), buckets)
    assert UNLIKELY < p_value < 1 - UNLIKELY


def test_the_chi_square_test_itself_fits_true_permutations_and_finds_false_ones() -> None:
    generator = np.random.default_rng(0)
    true = np.stack([generator.permutation(100) for _ in range(500)])
    assert 0.001 < pooled_chi_square(true, 20) < 0.999
    true[:, :50] = np.sort(true[:, :50])
    assert pooled_chi_square(true, 20) < 1e-12


def test_seeds_are_as_good_as_epochs() -> None:
    orders = np.concatenate([permutations(40, 1, seed) for seed in range(1500)])
    assert UNLIKELY < pooled_chi_square(orders, 40) < 1 - UNLIKELY


@pytest.mark.parametrize("size", [7, 64, 100, 1000])
def test_fixed_points_are_one_on_average(size: int) -> None:
    epochs = 2000
    orders = permutations(size, epochs, seed=2)
    fixed = (orders == np.arange(size)).sum(1)
    agreeing = (orders[1:] == orders[:-1]).sum(1)  # of one epoch with the next
    for counts in (fixed, agreeing):
        assert abs(counts.mean() - 1) < 4 / np.sqrt(epochs)
        assert abs(counts.var() - 1) < 0.25


@pytest.mark.parametrize("size", [64, 100, 1000])
@pytest.mark.parametrize("lag", [1, 2, 8, 32])
def test_differences_between_positions_are_those_of_a_true_permutation(size: int, lag: int) -> None:
    orders = permutations(size, 400, seed=3)
    generator = np.random.default_rng(4)
    true = np.stack([generator.permutation(size) for _ in range(400)])
    ours, theirs = (np.abs(sample[:, lag:] - sample[:, :-lag]).ravel() for sample in (orders, true))
    assert abs(ours.mean() - (size + 1) / 3) < 0.02 * size
    assert stats.ks_2samp(ours, theirs).pvalue > UNLIKELY
    neighbours = (orders[:, lag:] - orders[:, :-lag] == 1).sum(1)  # expected: (size - lag) / size of a permutation
    expected = (size - lag) / size
    assert abs(neighbours.mean() - expected) < 4 * np.sqrt(expected / 400)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_a_few_samples_are_equally_frequent(size: int) -> None:
    epochs = 12_000
    orders = Counter(map(tuple, permutations(size, epochs, seed=4).tolist()))
    possible = list(itertools.permutations(range(size)))
    assert set(orders) == set(possible)
    assert stats.chisquare([orders[order] for order in possible]).pvalue > UNLIKELY


# ---- the size of microbatches


def micro(num_processes: int, batch_size: int, **changes: Any) -> int:
    return resolve_micro_batch_size(Config(train=TrainConfig(batch_size=batch_size, **changes)), num_processes)


def test_the_default_is_one_microbatch_per_process() -> None:
    assert [micro(processes, 64) for processes in (1, 2, 4, 64)] == [64, 32, 16, 1]
    assert [micro(processes, 64, micro_batch_size=8) for processes in (1, 2, 4, 8)] == [8] * 4


def test_any_number_of_processes_up_to_that_of_microbatches_will_do() -> None:
    assert [micro(processes, 64, micro_batch_size=8) for processes in range(1, 9)] == [8] * 8


@pytest.mark.parametrize("microbatches", [1, 2, 7, 8, 13])
def test_blocks_are_contiguous_and_as_even_as_can_be(microbatches: int) -> None:
    for processes in range(1, microbatches + 1):
        blocks = [block_of(process, processes, microbatches) for process in range(processes)]
        assert [number for block in blocks for number in block] == list(range(microbatches))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1 <= min(map(len, blocks))


@pytest.mark.parametrize(
    ("processes", "batch_size", "micro_batch_size", "line"),
    [
        (5, 64, 16, "a step has 4 microbatches (--train.batch_size=64 / micro_batch_size 16), which is too few for 5 "
                    "processes: launch at most 4, or set micro_batch_size to 8"),
        (2, 64, 64, "a step has 1 microbatch (--train.batch_size=64 / micro_batch_size 64), which is too few for 2 "
                    "processes: launch at most 1, or set micro_batch_size to 32"),
        (3, 64, None, "--train.batch_size=64 is not a multiple of 3 processes: set --train.micro_batch_size (then any "
                      "number of processes up to batch_size / micro_batch_size will do), or launch 2 or 4 processes"),
        (8, 4, None, "a step has 4 microbatches (--train.batch_size=4 / micro_batch_size 1), which is too few for 8 "
                     "processes: launch at most 4"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_shown_with_some_that_do(
    processes: int, batch_size: int, micro_batch_size: int | None, line: str
) -> None:
    with pytest.raises(ValueError) as error:
        micro(processes, batch_size, micro_batch_size=micro_batch_size)
    assert str(error.value) == line


def test_a_static_graph_is_refused_with_accumulation() -> None:
    config = Config(runtime=RuntimeConfig(static_graph=True), train=TrainConfig(batch_size=64, micro_batch_size=16))
    assert resolve_micro_batch_size(config, 4) == 16
    with pytest.raises(ValueError, match=r"static_graph=true does not go with accumulation"):
        resolve_micro_batch_size(config, 2)


@pytest.mark.parametrize(
    ("batch_size", "processes", "proposed"),
    [(256, 1, 32), (256, 16, 16), (64, 1, 32), (64, 3, 16), (2048, 4, 256), (10, 2, 5)],
)
def test_a_proposed_microbatch_fits_other_numbers_of_processes(batch_size: int, processes: int, proposed: int) -> None:
    assert propose_micro_batch_size(batch_size, processes) == proposed
    assert batch_size // proposed >= processes and batch_size % proposed == 0
