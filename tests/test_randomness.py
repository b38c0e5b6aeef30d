"""Random numbers as pure functions: the same bits everywhere, uniform, and unrelated to their neighbours."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from lockstep.augment.transform import TRANSFORMS
from lockstep.randomness import draw, mix_array, mix_seed, sample_keys, seed_microbatch, seed_run, uniforms

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
# First outputs of SplitMix64 for the seed 1234567, as published with many implementations (Java's SplittableRandom).
SPLITMIX_1234567 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
UNLIKELY = 1e-4  # fixed seeds: a p-value below this would be a defect, not chance

uint64s = st.integers(0, MASK)


def signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def keys_of(seed: int, epoch: int, count: int, repeat: int = 0) -> Tensor:
    return sample_keys(seed, epoch, torch.arange(count), torch.full((count,), repeat))


# ---- The same bits ---------------------------------------------------------------------------------------------------


def test_published_splitmix64_in_python_numpy_and_torch() -> None:
    seed = 1234567
    states = [(seed + i * GOLDEN) & MASK for i in range(5)]  # mix_seed adds the constant once more itself
    assert [mix_seed(state) for state in states] == SPLITMIX_1234567
    assert mix_array(np.array(states, np.uint64) + np.uint64(GOLDEN)).tolist() == SPLITMIX_1234567
    numbers = uniforms(torch.tensor([seed]), 5)
    assert numbers.tolist() == [[(bits >> 11) / 2**53 for bits in SPLITMIX_1234567]]


@settings(deadline=None, max_examples=50)
@given(st.lists(uint64s, min_size=1, max_size=20))
def test_python_and_numpy_agree(values: list[int]) -> None:
    mixed = mix_array(np.array([(value + GOLDEN) & MASK for value in values], np.uint64))
    assert mixed.tolist() == [mix_seed(value) for value in values]


@settings(deadline=None, max_examples=50)
@given(st.lists(uint64s, min_size=1, max_size=20), st.integers(1, 50))
def test_python_and_torch_agree(values: list[int], count: int) -> None:
    numbers = uniforms(torch.tensor([signed(value) for value in values]), count)
    expected = [[(mix_seed(v + i * GOLDEN) >> 11) / 2**53 for i in range(count)] for v in values]
    assert numbers.dtype == torch.float64 and numbers.tolist() == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**63), st.integers(0, 1000), st.lists(st.integers(0, 10**12), min_size=1), st.integers(0, 8))
def test_sample_keys_as_in_python(seed: int, epoch: int, samples: list[int], repeat: int) -> None:
    keys = sample_keys(seed, epoch, torch.tensor(samples), torch.full((len(samples),), repeat))
    base = mix_seed(seed, epoch)
    expected = [mix_seed(mix_seed(sample + base - GOLDEN) + repeat - GOLDEN) for sample in samples]
    assert keys.dtype == torch.int64 and [key & MASK for key in keys.tolist()] == expected


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    samples, repeats = torch.arange(10_000), torch.arange(10_000) % 3
    keys = sample_keys(1, 2, samples, repeats)
    there = sample_keys(1, 2, samples.cuda(), repeats.cuda())
    assert torch.equal(there.cpu(), keys) and torch.equal(uniforms(there, 9).cpu(), uniforms(keys, 9))


# ---- Company does not matter -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(40)), st.integers(1, 40), st.integers(0, 2**40))
def test_a_sample_draws_the_same_in_any_company(order: list[int], size: int, seed: int) -> None:
    whole = uniforms(keys_of(seed, 3, 40), 6)
    chosen = torch.tensor(order[:size])
    part = uniforms(sample_keys(seed, 3, chosen, torch.zeros_like(chosen)), 6)
    assert torch.equal(part, whole[chosen])


def test_more_numbers_of_a_stream_begin_with_the_same() -> None:
    keys = keys_of(0, 0, 10)
    assert torch.equal(draw(keys, "flip", 12)[:, :5], draw(keys, "flip", 5))


def test_no_two_streams_overlap() -> None:
    """A transform's random numbers belong to it alone, however many another one draws."""
    keys, count = keys_of(0, 0, 20), 5_000
    numbers = torch.cat(
        [draw(keys, stream, count).flatten() for stream in TRANSFORMS] + [uniforms(keys, count).flatten()]
    )
    assert len(numbers.unique()) == len(numbers) == 20 * count * (len(TRANSFORMS) + 1)


# ---- Quality ---------------------------------------------------------------------------------------------------------


def test_uniforms_are_uniform_and_never_one() -> None:
    numbers = uniforms(keys_of(seed=0, epoch=0, count=50_000), 4)
    assert numbers.shape == (50_000, 4)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert uniforms(torch.tensor([-1, 0, 2**63 - 1, -(2**63)]), 1000).max() < 1
    for column in numbers.T.numpy():
        assert stats.kstest(column, "uniform").pvalue > UNLIKELY
        assert abs(column.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / len(column))
        assert abs(column.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / len(column))


def test_streams_and_neighbours_are_uncorrelated() -> None:
    count = 40_000
    streams = {
        "sample": uniforms(keys_of(0, 0, count), 3),
        "next sample": uniforms(keys_of(0, 0, count + 1)[1:], 3),
        "next epoch": uniforms(keys_of(0, 1, count), 3),
        "next seed": uniforms(keys_of(1, 0, count), 3),
        "next repeat": uniforms(keys_of(0, 0, count, repeat=1), 3),
        "flip": draw(keys_of(0, 0, count), "flip", 3),
        "erase": draw(keys_of(0, 0, count), "erase", 3),
    }
    # A correlation of true random numbers has the standard deviation 1 / sqrt(count).
    table = np.corrcoef(torch.cat(list(streams.values()), dim=1).T.numpy())
    assert np.abs(table[~np.eye(len(table), dtype=bool)]).max() < 4.5 / np.sqrt(count)


def test_every_part_of_a_seed_matters() -> None:
    parts = [(a, b, c) for a, b, c in itertools.product(range(12), repeat=3)] + [(), (0,), (0, 0), (1,), (0, 1), (1, 0)]
    assert len({mix_seed(*part) for part in parts}) == len(parts)
    keys = [keys_of(seed, epoch, 50, repeat) for seed, epoch, repeat in itertools.product(range(5), repeat=3)]
    assert len(torch.cat(keys).unique()) == 5**3 * 50


@settings(deadline=None, max_examples=50)
@given(st.lists(uint64s, min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 63))
def test_one_bit_of_a_seed_changes_about_half_of_all_bits(parts: list[int], place: int, bit: int) -> None:
    changed = list(parts)
    changed[place % len(parts)] ^= 1 << bit
    flips = (mix_seed(*parts) ^ mix_seed(*changed)).bit_count()
    assert 10 <= flips <= 54  # 32 +- 5.5 standard deviations


def test_a_seed_is_a_64_bit_number_whatever_it_is_made_of() -> None:
    for parts in [(0,), (-1, 5), (2**64 + 3,), (10**30, 7)]:
        assert 0 <= mix_seed(*parts) <= MASK
    assert mix_seed(2**64 + 3) == mix_seed(3)


# ---- torch's own generator -------------------------------------------------------------------------------------------


def dropped(seed: int, step: int, microbatch: int) -> Tensor:
    torch.rand(step + 1)  # whatever was drawn before must not matter
    seed_microbatch(seed, step, microbatch)
    return nn.Dropout(0.5)(torch.ones(256))


def test_dropout_follows_from_seed_step_and_microbatch() -> None:
    places = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 2)))
    masks = {place: dropped(*place) for place in places}
    for place in reversed(places):
        assert torch.equal(dropped(*place), masks[place])
    for one, other in itertools.combinations(places, 2):
        agreeing = int((masks[one] == masks[other]).sum())
        assert 80 < agreeing < 176, f"dropout of {one} and {other} is related"


def test_first_weights_follow_from_the_seed() -> None:
    def weights(seed: int) -> Tensor:
        seed_run(seed)
        return nn.Linear(20, 20).weight.detach()

    first = weights(7)
    torch.rand(5)
    assert torch.equal(weights(7), first)
    assert not torch.equal(weights(8), first)


def test_any_seed_is_taken() -> None:
    for seed in (0, 2**31, 2**63, 2**64 - 1, 10**30):
        seed_run(seed)
        seed_microbatch(seed, 10**9, 4096)
