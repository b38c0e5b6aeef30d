"""Running statistics: one move per step, from the mean over all microbatches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lockstep.launch.accelerator import Launch
from lockstep.models.freeze import freeze
from lockstep.models.network import build_model, convert_to_sync_batchnorm
from lockstep.settings.config import ModelConfig
from lockstep.training.batchnorm import RunningStatistics

MOMENTUM, ACCUMULATION = 0.2, 3


def network(dimensions: int) -> nn.Sequential:
    torch.manual_seed(0)
    layer: nn.Module = nn.BatchNorm1d(3, momentum=MOMENTUM) if dimensions == 1 else nn.BatchNorm2d(3, momentum=MOMENTUM)
    return nn.Sequential(layer).double()


def microbatches(dimensions: int, count: int = ACCUMULATION, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 3) if dimensions == 1 else (5, 3, 4, 2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * (i + 1) + i for i in range(count)]


def statistics_of(batch: Tensor) -> tuple[Tensor, Tensor]:
    values = batch.movedim(1, 0).flatten(1)
    return values.mean(1), values.var(1, unbiased=True)


def statistics_over(model: nn.Module, leaves: int = ACCUMULATION) -> RunningStatistics:
    return RunningStatistics(model, leaves, Launch(torch.device("cpu"), 1, 0, 0, "no", 1))


def step(model: nn.Module, statistics: RunningStatistics, batches: list[Tensor], bad: bool = False) -> None:
    model.train()
    for number, batch in enumerate(batches):
        model(batch)
        statistics.collect(number)
    statistics.commit(torch.tensor(bad))


def test_frozen_statistics_stay_to_the_last_bit() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    step(model, statistics_over(model), microbatches(2))
    freeze(model, ["0"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = statistics_over(model)
    step(model, statistics, microbatches(2, seed=2))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize("dimensions", [1, 2])
def test_one_momentum_step_from_the_mean_over_microbatches(dimensions: int) -> None:
    model = network(dimensions)
    layer: Any = model[0]
    statistics = statistics_over(model)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for seed in range(3):
        batches = microbatches(dimensions, seed=seed)
        step(model, statistics, batches)
        means, variances = zip(*map(statistics_of, batches), strict=True)
        mean = (1 - MOMENTUM) * mean + MOMENTUM * torch.stack(means).mean(0)
        var = (1 - MOMENTUM) * var + MOMENTUM * torch.stack(variances).mean(0)
        # Between steps the network's own buffers hold them, for evaluation and checkpoints.
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=0)
        assert layer.num_batches_tracked == seed + 1, "steps are counted, not microbatches"


def test_without_accumulation_it_is_what_torch_does() -> None:
    ours, theirs = network(2), network(2)
    statistics = statistics_over(ours, leaves=1)
    for batch in microbatches(2, 4):
        step(ours, statistics, [batch])
        theirs.train()(batch)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=0)


def test_the_batch_itself_is_normalised_as_ever() -> None:
    ours, theirs = network(2), network(2)
    statistics_over(ours)
    batch = microbatches(2)[1]
    assert torch.equal(ours.train()(batch), theirs.train()(batch))


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/test_efficientnet"])
def test_networks_of_timm(name: str) -> None:
    """The second has timm's BatchNormAct2d, with a forward of its own; its statistics are seen by a hook."""
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name), (3, 32, 32), 5).double()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(layers) > 10
    assert any(isinstance(layer, BatchNormAct2d) for layer in layers.values()) == ("efficientnet" in name)
    momenta = {n: layer.momentum for n, layer in layers.items()}
    before = {n: [b.clone() for b in layer.buffers()] for n, layer in layers.items()}  # mean, variance, count
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in layers}
    for n, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, n=n: seen[n].append(statistics_of(inputs[0].detach())))
    images = [torch.randn(4, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    step(model, statistics_over(model, leaves=2), images)
    for n, layer in layers.items():
        means, variances = (torch.stack(parts).mean(0) for parts in zip(*seen[n], strict=True))
        for got, old, new in ((layer.running_mean, before[n][0], means), (layer.running_var, before[n][1], variances)):
            expected = (1 - momenta[n]) * old + momenta[n] * new  # type: ignore[operator]
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=n)
        assert layer.num_batches_tracked == 1


def test_each_layer_keeps_its_own_momentum() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.BatchNorm1d(3, momentum=0.1)).double()
    inputs = microbatches(1)[2] * 3
    step(model, statistics_over(model, leaves=1), [inputs])
    mean, _ = statistics_of(inputs)
    torch.testing.assert_close(model[0].running_mean, 0.5 * mean)
    # The second layer sees normalised input: mean 0, variance n / (n - 1).
    torch.testing.assert_close(model[1].running_var, torch.full((3,), 0.9 + 0.1 * 5 / 4).double(), rtol=1e-4, atol=0)


def test_momentum_none_is_refused_with_the_layers_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=None))
    with pytest.raises(ValueError, match=r"^batch norm 1 .*give it a momentum$"):
        statistics_over(model)


def test_networks_without_statistics_are_left_alone() -> None:
    for layer in (nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3)):
        model = nn.Sequential(layer).double()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        step(model, statistics_over(model), microbatches(1))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_bad_step_leaves_no_trace_but_its_count() -> None:
    with_bad, without = network(2), network(2)
    spoilt = [batch.index_fill(0, torch.tensor([1]), torch.inf) for batch in microbatches(2)]
    statistics, reference = statistics_over(with_bad), statistics_over(without)
    for batches, bad in ((microbatches(2, seed=2), False), (spoilt, True), (microbatches(2, seed=3), False)):
        step(with_bad, statistics, batches, bad)
        if not bad:
            step(without, reference, batches)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(with_bad[0], name), getattr(without[0], name)), name
    assert with_bad[0].num_batches_tracked == 3, "a skipped step is a step"


def test_going_on_from_a_checkpoint(
    tmp_path: Path,
) -> None:
    batches = [microbatches(2, seed=seed) for seed in range(4)]
    straight = network(2)
    statistics = statistics_over(straight)
    for each in batches[:2]:
        step(straight, statistics, each)
    torch.save(straight.state_dict(), tmp_path / "weights.pt")
    for each in batches[2:]:
        step(straight, statistics, each)

    fresh = network(2)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    resumed = statistics_over(fresh)  # as train.py: the weights come first
    for each in batches[2:]:
        step(fresh, resumed, each)
    late = network(2)
    reloaded = statistics_over(late)
    step(late, reloaded, batches[3])
    late(batches[0][0])
    reloaded.collect(0)  # a step that was given up
    late.load_state_dict(torch.load(tmp_path / "weights.pt"))
    reloaded.reload()
    for each in batches[2:]:
        step(late, reloaded, each)
    for model in (fresh, late):
        for name, value in straight.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_sync_batchnorm_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="--runtime.sync_batchnorm=true needs GPUs, and this run is on cpu"):
        convert_to_sync_batchnorm(network(2), torch.device("cpu"))
