"""What only a GPU can show: bits of its kernels, waiting for it, its scaler, its memory, processes that share it."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from launches import NETWORKS as PROVED
from launches import PROOF, train_on
from runs import differences
from soak import STREAMED
from steps import EVERYTHING, NETWORKS
from stretch import prepared, stretch

from lockstep.data import loader
from lockstep.errors import UserError
from lockstep.launch.preemption import Preemption
from lockstep.launch.transfer import copied, to_device
from lockstep.run.digest import digest
from lockstep.run.folder import read_summary
from lockstep.training import memory
from lockstep.training.progress import Progress

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """1 GiB of the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.mem_get_info()[1])
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_stopped_and_continued_and_one_repeated_have_the_same_bits(
    precision: str, train_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*PROOF, *PROVED["resnet"], f"--runtime.precision={precision}")
    whole = train_here(*settings, "--run.name=whole")
    assert differences(train_here(*settings, "--run.name=again"), whole) == []
    asked = itertools.count(1)

    def wanted(preemption: Preemption) -> bool:
        preemption.reason = preemption.reason or ("every seventh time" if next(asked) % 7 == 0 else None)
        return preemption.reason is not None

    monkeypatch.setattr(Preemption, "wanted", wanted)
    stopped = train_here(*settings, "--run.name=stopped")
    assert read_summary(stopped)["state"] != "finished"
    while read_summary(stopped)["state"] != "finished":
        train_here(*settings, "--run.name=stopped")
    found = [text for text in differences(stopped, whole) if not text.startswith(("stray", "missing"))]
    assert found == []  # but for the checkpoints of its stops


@pytest.mark.parametrize("network", PROVED)
def test_processes_that_share_a_gpu_have_the_bits_of_one(network: str, server: ForkServer, tmp_path: Path) -> None:
    """Their gradients are exchanged on a stream beside that of the backward pass."""
    alone = train_on(server, 1, tmp_path, *PROVED[network])
    for processes in (2, 3):
        shared = train_on(server, processes, tmp_path, *PROVED[network], "--runtime.backend=gloo")
        assert differences(shared, alone) == []


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_waits_for_nothing(network: str, precision: str, optimizer: str, fresh_accelerate: None) -> None:
    settings = (f"--runtime.precision={precision}", f"--optim.name={optimizer}", *NETWORKS[network])
    with prepared(*EVERYTHING, *settings) as training:
        stretch(training, steps=2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            stretch(training, steps=6)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert training.meter.read(Progress()).window.samples > 0


def test_a_copy_to_the_device_is_pinned_and_right() -> None:
    numbers = torch.arange(1000).view(2, -1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = [
            to_device(numbers + i, torch.device("cuda")) for i in range(50)
        ]  # whose memory is used again and again
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(tensor.cpu(), numbers + i) for i, tensor in enumerate(there))


def test_batches_copied_beside_slow_work_are_those_that_it_sees() -> None:
    """Without the wait it would see what was there before; without the memory kept for it, what comes after."""
    batches = ((torch.full((2**20,), i).pin_memory(), torch.tensor([i]).pin_memory()) for i in range(200))
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, number in copied(batches, torch.device("cuda")):
            torch.cuda._sleep(10**6)  # about half a millisecond of the GPU: the host runs ahead
            sums.append((images - number).abs().sum() + images.sum())
            del images, number  # whose memory the next may have
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(sums).tolist() == [i * 2**20 for i in range(200)]


def test_a_streamed_run_has_the_bits_of_one_that_copies_in_order(
    train_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*PROOF, *PROVED["fashion_cnn"], *STREAMED)
    beside = train_here(*settings, "--run.name=beside")

    def in_order(batches: Iterator[tuple[torch.Tensor, ...]], device: torch.device) -> Iterator[Any]:
        return (tuple(to_device(part, device) for part in batch) for batch in batches)

    monkeypatch.setattr(loader, "copied", in_order)
    assert differences(train_here(*settings, "--run.name=in_order"), beside) == []


def test_fp16_skips_a_step_that_overflows_and_lowers_its_scale(fresh_accelerate: None) -> None:
    with prepared("--runtime.precision=fp16", "--model.name=fashion_cnn", "--optim.lr=0.01") as training:
        stretch(training, steps=1)
        scaler, model = training.learner.accelerator.scaler, training.learner.model
        digests = []
        for scale in (1024.0, 2.0**100, 1024.0):
            scaler.update(scale)
            weights = [parameter.detach().clone() for parameter in model.parameters()]
            bad = training.meter.read(Progress()).bad_steps.total
            stretch(training, steps=1)
            same = all(map(torch.equal, weights, model.parameters()))
            digests.append((same, training.meter.read(Progress()).bad_steps.total - bad, scaler.get_scale() < scale))
        assert digests == [(False, 0, False), (True, 1, True), (False, 0, False)]
        assert int(digest(model, None))


HUNGRY = ("--data.source=synthetic:64x64x3x5000", "--model.name=timm/resnet18", "--train.batch_size=4096")


def test_running_out_of_memory_names_the_setting_to_lower(train_here: Any, little_memory: None) -> None:
    with pytest.raises(UserError, match="out of memory: lower --train.micro_batch_size=4096 to a divisor of it"):
        train_here(*HUNGRY, "--train.micro_batch_size=4096", "--run.name=hungry", "--train.max_steps=1")


def test_auto_finds_a_microbatch_that_fits(
    train_here: Any, little_memory: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "_SPARE_SHARE", 0.0)  # of the whole GPU, which this process has not got
    train_here(*HUNGRY, "--train.micro_batch_size=auto", "--run.name=auto", "--train.max_steps=1")
    found = [line for line in capsys.readouterr().out.splitlines() if "is the largest that fits" in line]
    assert len(found) == 1 and 4096 > int(found[0].split()[1]) >= 16
