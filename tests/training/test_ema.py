"""The moving average against its formula, the swap for evaluation bit for bit, and the way through safetensors."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lockstep.training.ema import ExponentialAverage


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).to(dtype)


def disturb(model: nn.Module, seed: int) -> None:
    """One "update": new weights, new running statistics, one more batch counted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.add_(noise.to(value.dtype) if value.is_floating_point() else 1)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_averages_follow_the_formula(dtype: torch.dtype) -> None:
    model = network(dtype)
    average = ExponentialAverage(model, 0.5)
    expected = {name: value.double() for name, value in copies(model).items()}
    for step in range(1, 21):
        disturb(model, step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            moved = decay * expected[name] + (1 - decay) * value.double()
            expected[name] = moved if value.is_floating_point() else value.double()
    for name, value in average.state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
        rtol = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(value.double(), expected[name], rtol=rtol, atol=rtol)
    assert average.state_dict()["1.num_batches_tracked"] == 20
    assert not torch.equal(average.state_dict()["1.running_mean"], model.state_dict()["1.running_mean"])


def test_decay_grows_to_its_setting() -> None:
    average = ExponentialAverage(network(), 0.99)
    assert average.decay_at(0) == 0.1 and average.decay_at(1) == 2 / 11 and average.decay_at(90) == 0.91
    assert average.decay_at(10_000) == 0.99
    given = ExponentialAverage(network(), 0.99, averages_are_given=True)
    assert given.decay_at(1) == given.decay_at(10_000) == 0.99, "averages of a run before must not fade"


@pytest.mark.parametrize("warmup", ["power", "none"])
def test_decay_is_that_of_timm(warmup: Literal["power", "none"]) -> None:
    """timm's train script counts the update just done, as we do."""
    model = network()
    average = ExponentialAverage(model, 0.99, warmup)
    theirs = ModelEmaV3(network(), decay=0.99, use_warmup=warmup == "power")
    assert [average.decay_at(step) for step in range(1, 1500)] == [theirs.get_decay(step) for step in range(1, 1500)]
    for step in range(1, 6):
        disturb(model, step)
        average.update(step)
        theirs.update(model, step)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_weights_that_stand_still_are_their_own_average() -> None:
    model = network()
    average = ExponentialAverage(model, 0.9)
    for step in range(1, 10):
        average.update(step)
    assert equal(average.state_dict(), copies(model))


def test_mixed_types_are_averaged_each_in_its_own() -> None:
    model = network(torch.float32)
    model[3].double()
    average = ExponentialAverage(model, 0.0)
    disturb(model, 1)
    average.update(1)
    assert equal(average.state_dict(), copies(model))


def test_applied_evaluates_the_average_and_restores_every_bit() -> None:
    model = network()
    average = ExponentialAverage(model, 0.9)
    disturb(model, 1)
    average.update(1)
    model[0].weight.data[0, 0, 0, 0] = float("nan")  # a diverged network must come back as it was, too
    own, averages, tensors = copies(model), average.state_dict(), [id(p) for p in model.parameters()]
    images = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    reference = network()
    reference.load_state_dict(averages)
    with average.applied():
        assert equal(copies(model), averages)
        assert torch.equal(model.eval()(images), reference.eval()(images))
        assert [id(p) for p in model.parameters()] == tensors
    restored = copies(model)
    assert all(own[name].numpy().tobytes() == restored[name].numpy().tobytes() for name in own)
    assert equal(average.state_dict(), averages)


def test_applied_restores_after_an_error() -> None:
    model = network()
    average = ExponentialAverage(model, 0.9)
    disturb(model, 1)
    own = copies(model)
    with pytest.raises(RuntimeError, match="out of memory"), average.applied():
        assert not equal(copies(model), own)
        raise RuntimeError("out of memory")
    assert equal(copies(model), own)


def test_training_is_the_same_with_evaluations_in_between() -> None:
    def train(evaluate: bool) -> dict[str, Tensor]:
        model = network()
        average = ExponentialAverage(model, 0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(1, 6):
            images = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model.train()(images).square().mean().backward()
            optimizer.step()
            average.update(step)
            if evaluate:
                with average.applied(), torch.no_grad():
                    model.eval()(images)
        return copies(model) | {f"average.{name}": value for name, value in average.state_dict().items()}

    assert equal(train(evaluate=True), train(evaluate=False))


def test_tied_weights_and_other_memory_layouts_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight
    average = ExponentialAverage(model, 0.5)
    disturb(model, 1)
    average.update(1)
    own = copies(model)
    with average.applied():
        assert torch.equal(model[0].weight, average.state_dict()["0.weight"])
    assert equal(copies(model), own)
    assert model[0].weight is model[1].weight
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_averages_survive_safetensors_and_continue_bit_for_bit(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)

    model, copy = build(), build()
    straight, resumed = ExponentialAverage(model, 0.9), ExponentialAverage(copy, 0.9)
    for step in range(1, 4):
        disturb(model, step)
        straight.update(step)
    assert all(value.is_contiguous() for value in straight.state_dict().values())
    save_file(straight.state_dict(), tmp_path / "ema.safetensors")
    resumed.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    assert equal(resumed.state_dict(), straight.state_dict())
    disturb(model, 4)
    copy.load_state_dict(model.state_dict())
    straight.update(4)
    resumed.update(4)
    assert equal(resumed.state_dict(), straight.state_dict())


def test_loaded_averages_are_not_tied_to_what_was_loaded() -> None:
    model = network()
    saved = copies(model)
    average = ExponentialAverage(model, 0.5)
    average.load_state_dict(saved)
    disturb(model, 1)
    average.update(1)
    assert equal(saved, copies(network()))


def test_averages_of_another_network_are_refused_untouched() -> None:
    average = ExponentialAverage(network(), 0.9)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    other = {**copies(network()), "3.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"belong to another network: 1 entries differ, the first is 3\.bias"):
        average.load_state_dict(other)
    del other["0.weight"]
    with pytest.raises(ValueError, match=r"the first is 0\.weight"):
        average.load_state_dict(other)
    assert equal(average.state_dict(), before)
