"""Copies to a device: from pinned memory to a GPU, and never waited for."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lockstep.errors import UserError
from lockstep.launch.transfer import copied, to_device


@pytest.mark.parametrize(("device", "pins"), [("cuda", 1), ("cpu", 0)])
def test_a_copy_is_not_waited_for_and_goes_to_a_gpu_by_pinned_memory(
    device: str, pins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *to, **how: done.append((*to, how)) or tensor)
    numbers = torch.arange(3)
    assert to_device(numbers, torch.device(device)) is numbers
    assert done == ["pinned"] * pins + [(torch.device(device), {"non_blocking": True})]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is asked of CUDA's streams and of tensors, in order; nothing of it is done."""
    done: list[object] = []

    class Stream:
        def __init__(self, device: object = None) -> None:
            done.append(f"stream on {device}")

        def wait_stream(self, other: object) -> None:
            done.append(("waits", names[self], names[other]))

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    def to(tensor: Tensor, *_: object, **__: object) -> Tensor:
        done.append(("copied", int(tensor), names[now[-1]]))
        return tensor

    computing = Stream()
    now, names = [computing], defaultdict(lambda: "side", {computing: "computing"})
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: done.append(("kept for", int(tensor), names[stream]))
    )
    done.clear()
    return done


def asked(done: list[object], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(count):
        done.append(f"asked for {i}")
        yield torch.tensor(10 * i), torch.tensor(10 * i + 1)
    raise UserError("the next image is broken")


def test_batches_go_to_a_gpu_on_a_stream_that_is_waited_for_each_in_its_turn(streams: list[object]) -> None:
    batches = copied(asked(streams, 2), torch.device("cuda"))
    assert streams == []
    for i in range(2):
        assert tuple(map(int, next(batches))) == (10 * i, 10 * i + 1)
        assert streams == ["stream on cuda"] * (i == 0) + [
            f"asked for {i}",
            ("copied", 10 * i, "side"),
            ("copied", 10 * i + 1, "side"),
            ("waits", "computing", "side"),
            ("kept for", 10 * i, "computing"),
            ("kept for", 10 * i + 1, "computing"),
        ]
        streams.clear()
    with pytest.raises(UserError, match="the next image is broken"):  # only who asks for it hears of it
        next(batches)
    assert streams == []


def test_on_a_cpu_there_are_no_streams(streams: list[object]) -> None:
    batches = copied(asked(streams, 1), torch.device("cpu"))
    assert tuple(map(int, next(batches))) == (0, 1)
    assert streams == ["asked for 0", ("copied", 0, "computing"), ("copied", 1, "computing")]
