"""A whole step of train.py on torch's `meta` device, which has no numbers: whatever waits for some is an error.

`item`, `tolist`, `if tensor`, boolean indices and copies to the host are refused there, and so is a tensor of another
device in a computation. `Waits` refuses what only a real GPU would wait for.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import step_share
import torch
from pieces.measured import bare_step
from steps import EVERYTHING, NETWORKS
from stretch import Enough, prepared, stretch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.training import optim
from lockstep.training.meter import Meter

SMALL = ("--train.batch_size=16", "--train.micro_batch_size=16", "--model.name=tiny_cnn")


class Waits(TorchDispatchMode):
    """Refuses a copy to the device for which the host waits, and a check of linear algebra's success."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = function._schema.name.removeprefix("aten::"), kwargs or {}
        if name == "_to_copy" and not args[0].is_meta and torch.device(options.get("device", "cpu")).type == "meta":
            assert options.get("non_blocking"), "a copy to the device that is waited for"
        assert name != "lift_fresh" or not args[0].is_meta, "a list copied to the device, which is waited for"
        assert name != "copy_" or args[0].device == args[1].device or args[1].ndim == 0, "a copy that is waited for"
        assert name != "_linalg_check_errors", "a check that waits for the device"
        return function(*args, **options)


@pytest.fixture
def on_meta(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate takes the device from this variable; optimizers are fused, as on GPUs, and so do not wait."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    record = optim.OPTIMIZERS["adamw"]
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", record._replace(fused_on=frozenset({"meta"})))
    supported = import_module("torch.optim.optimizer")  # which torch.optim hides
    monkeypatch.setattr(supported, "_get_fused_kernels_supported_devices", lambda: ["meta"])


@pytest.mark.parametrize("network", ["fashion_cnn", pytest.param("resnet", marks=pytest.mark.slow)])
def test_a_step_waits_for_nothing_and_mixes_no_devices(network: str, on_meta: None) -> None:
    with prepared(*EVERYTHING, *NETWORKS[network]) as training:
        stretch(training, steps=1)  # which puts constants on the device
        with Waits():
            stretch(training, steps=4)  # by lot, some with mixup and some with cutmix
        assert training.progress.step == 5 and training.learner.optimizer.optimizer.defaults["fused"]
        assert next(training.learner.model.parameters()).is_meta


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_has_few_operations_beside_network_loss_and_update(fresh_accelerate: None) -> None:
    """Each costs up to 20 microseconds, whatever it holds; there were 225 once."""
    settings = (*step_share.SETTINGS, "--model.name=cifar10_cnn", "--data.source=synthetic:32x32x3x512")
    with prepared(*settings, "--train.batch_size=16", "--train.micro_batch_size=16") as training:
        stretch(training, steps=2)
        with Operations() as ours:
            stretch(training, steps=32)
        bare = bare_step(training, 16)
        with Operations() as others:
            bare(32)
    assert ours.count - others.count < 62 * 32, (ours.count / 32, others.count / 32)


@pytest.mark.parametrize("augment", ["--augment.crop_padding=4", "--augment.flip=true", "--augment.rotation=30"])
def test_the_loop_trains_on_augmented_images(augment: str, fresh_accelerate: None) -> None:
    """Some transforms are the loader's to apply, some the transform's: each reaches the weights."""
    plain = ("--augment.rotation=0", "--augment.zoom=0", "--augment.translate=0")
    norms = []
    for settings in (plain, (*plain, augment)):
        with prepared(*SMALL, *settings, "--data.source=synthetic:8x8x1x64") as training:
            stretch(training, steps=1)
            norms.append(sum(weight.double().norm().item() for weight in training.learner.model.parameters()))
    assert norms[0] != norms[1]


SLIPS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda losses: losses.sum().item(),
    "if": lambda losses: bool(losses.isfinite().all()),
    "mask": lambda losses: losses[losses > 0],
    "to the host": lambda losses: losses.cpu(),
    "another device": lambda losses: losses * torch.ones(len(losses)),
    "from ordinary memory": lambda losses: torch.ones(3).to(losses.device),
    "linear algebra": lambda losses: torch.linalg.inv(torch.eye(3, device=losses.device)),
}
if torch.__version__ >= (2, 15):  # torch 2.11 makes it of a list where no mode can look
    SLIPS["a list"] = lambda losses: torch.tensor([1.0, 2.0], device=losses.device)


def test_every_slip_in_a_step_is_noticed(on_meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with prepared(*SMALL) as training:
        stretch(training, steps=1)
        for slip in SLIPS.values():
            monkeypatch.setattr(Meter, "add", lambda meter, number, losses, *_, slip=slip: slip(losses))
            with Waits(), pytest.raises((RuntimeError, AssertionError)):
                stretch(training, steps=1)


def test_the_share_of_the_bare_step_is_measured_step_by_step() -> None:
    """Each stretch has as many bare steps as steps of the loop, and the share is the one time over the other."""
    options = argparse.Namespace(batch_size=8, precision="no", steps=3, stretches=2)
    row = step_share.measure("tiny_cnn", options)
    name, ours, bare, share, span = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "tiny_cnn" and all(float(time.removesuffix(" ms")) > 0 for time in (ours, bare))
    lowest, highest = map(float, span.split(" to "))
    assert lowest - 0.01 <= float(share) <= highest + 0.01

    made: list[int] = []
    beside = step_share._Beside(made.append, steps=3)
    with pytest.raises(Enough):
        for _ in range(9):
            assert beside.agreed() is False
    assert made == [1, 1, 1] and len(beside.loop_seconds) == len(beside.bare_seconds) == 3
