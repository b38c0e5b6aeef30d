"""The digest in every line of the log: what changes it, and what does not."""

import random

import pytest
import torch
from torch import nn

from lockstep.run.digest import as_text, digest, digest_of
from lockstep.training.ema import ExponentialAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 70_000 // 16))


def flipped(tensor: torch.Tensor, place: int, bit: int) -> torch.Tensor:
    changed = tensor.clone()
    bits = changed.flatten().view({4: torch.int32, 8: torch.int64}[tensor.element_size()])
    bits[place] ^= 1 << bit if bit < 31 else -(1 << bit)
    return bits.view(tensor.dtype).view_as(tensor)


def test_every_single_bit_counts() -> None:
    """Weights, running statistics and counters alike."""
    weights = dict(network().state_dict())
    usual, draws = int(digest_of(weights)), random.Random(0)
    for _ in range(300):
        name = draws.choice(list(weights))
        place, bit = draws.randrange(weights[name].numel()), draws.randrange(31)
        assert int(digest_of({**weights, name: flipped(weights[name], place, bit)})) != usual, (name, place, bit)


def test_layout_and_order_do_not_count_but_places_do() -> None:
    weights = dict(network().state_dict())
    usual = int(digest_of(weights))
    laid_out = {**weights, "0.weight": weights["0.weight"].to(memory_format=torch.channels_last)}
    assert int(digest_of(laid_out)) == usual
    assert int(digest_of({**weights, "0.weight": weights["0.weight"].flip(0)})) != usual
    exchanged = {**weights, "1.weight": weights["1.bias"], "1.bias": weights["1.weight"]}
    assert int(digest_of(exchanged)) != usual
    assert int(digest_of({"w": torch.zeros(3)})) == int(digest_of({"w": torch.zeros(3)}))


def test_zero_and_minus_zero_are_two() -> None:
    assert int(digest_of({"w": torch.tensor([0.0])})) != int(digest_of({"w": torch.tensor([-0.0])}))


def test_the_average_is_part_of_it() -> None:
    model = network()
    average = ExponentialAverage(model, 0.9)
    without, with_it = int(digest(model, None)), int(digest(model, average))
    assert without != with_it
    for value in average.state_dict().values():
        if value.is_floating_point():
            value.add_(1)
    assert int(digest(model, average)) != with_it and int(digest(model, None)) == without


@pytest.mark.parametrize(("value", "text"), [(0, "0" * 16), (255, "0" * 14 + "ff"), (-1, "f" * 16)])
def test_text_is_16_digits(value: int, text: str) -> None:
    assert as_text(value) == text


def test_a_known_digest() -> None:
    """Logs of years are compared by it: it must never change."""
    tensors = {"a": torch.arange(5.0), "b": torch.arange(70_000, dtype=torch.float64), "n": torch.tensor(3)}
    assert as_text(int(digest_of(tensors))) == "163dac8b98487b61"
