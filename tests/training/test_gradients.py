"""Gradients on real processes: what is left in the parameters is the tree's sum, to the last bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fork_server import ForkServer

from lockstep.training.gradients import _Buckets
from lockstep.training.pace import Pace
from lockstep.training.tree import Subtrees

PROGRAM = '''
import copy, json, os, sys
import torch
from torch import nn
from torch.nn import functional as F
from lockstep.data.sampler import block_of
from lockstep.launch.accelerator import build_accelerator, end_program
from lockstep.launch.sharding import prepare, shard, whole
from lockstep.settings.config import RuntimeConfig
from lockstep.training.gradients import Gradients

LEAVES, STEPS = 8, 3
settings = json.loads(sys.argv[1])
late = settings.pop("late", False)
config = RuntimeConfig(threads=1, **settings)
accelerator, launch = build_accelerator(config)


class Network(nn.Module):
    """A convolution in another memory layout, more weights than one DDP bucket holds, a scale without dimensions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.wide = nn.ModuleList(nn.Linear(16, 16) if i else nn.Linear(16 * 36, 16) for i in range(3))
        self.large = nn.Linear(16, 40_000)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.side = nn.Linear(16, 16)

    def forward(self, images):
        features = F.relu(self.conv(images)).flatten(1)
        for layer in self.wide:
            features = layer(features)
        if images[0, 0, 0, 0] > 0 or launch.num_processes > 1:  # no part of every microbatch of one process alone
            features = features + self.side(features)
        return self.scale * self.large(features)


def loss_of(network, step, number):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * step + number))
    return F.cross_entropy(network(images.to(memory_format=torch.channels_last)), torch.arange(4)) / LEAVES


class Late:
    """A collective that sends and receives when it is waited for, and not before: the least that NCCL promises."""

    under_way = most_under_way = 0

    def __init__(self, collective, received, *arguments):
        received.fill_(torch.nan)
        self.run, Late.under_way = lambda: collective(received, *arguments), Late.under_way + 1
        Late.most_under_way = max(Late.most_under_way, Late.under_way)

    def wait(self):
        self.run()
        Late.under_way -= 1


if late:
    for name in ("all_to_all_single", "all_gather_into_tensor"):
        collective = getattr(torch.distributed, name)
        setattr(torch.distributed, name, lambda *a, f=collective, async_op: Late(f, *a) if async_op else f(*a))


def tree_sum(values):
    """Level by level, which is another way to write the same tree."""
    while len(values) > 1:
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = [pair[0] if len(pair) == 1 or pair[1] is None else pair[1] if pair[0] is None else pair[0] + pair[1]
                  for pair in pairs]
    return values[0]


torch.manual_seed(0)
model = Network().to(memory_format=torch.channels_last)
shard(model, launch, compress_gradients=False)
torch.manual_seed(0)
alone = Network().to(memory_format=torch.contiguous_format if config.fsdp else torch.channels_last)
network = prepare(accelerator, launch, model, config)
numbers = block_of(launch.process_index, launch.num_processes, LEAVES)
gradients = Gradients(network, numbers, LEAVES, launch, config)
wrong = 0
for step in range(STEPS):  # DDP deals its buckets anew after the first one
    for number in numbers:
        with gradients.microbatch(number):
            loss_of(network, step, number).backward()
    parts = []
    for number in range(LEAVES):
        alone.zero_grad()
        loss_of(alone, step, number).backward()
        parts.append([parameter.grad for parameter in alone.parameters()])
    for got, *values in zip(model.parameters(), *parts):
        wrong += not torch.equal(whole(got.grad), tree_sum(values))
    model.zero_grad()
if late:
    assert Late.under_way == 0 and Late.most_under_way > 1, "nothing is sent while the backward pass goes on"
os.write(1, f"{launch.process_index} differ: {wrong}\\n".encode())  # in one piece: all ranks write to one file
end_program()
'''


@pytest.mark.launch
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (1, "{}"),
        (2, "{}"),
        (3, "{}"),
        (3, '{"bucket_view": false}'),
        (2, '{"late": true, "backend": "gloo"}'),
        (1, '{"fsdp": true}'),
        (2, '{"fsdp": true}'),
        (4, '{"fsdp": true}'),
    ],
)
def test_the_sum_is_the_trees(processes: int, settings: str, server: ForkServer, tmp_path: Path) -> None:
    program = tmp_path / "gradients.py"
    program.write_text(PROGRAM)
    printed = server.run(processes, tmp_path, settings, program=program)
    assert sorted(line for line in printed.splitlines() if "differ" in line) == [
        f"{rank} differ: 0" for rank in range(processes)
    ]


@pytest.mark.launch
def test_the_check_notices_another_order(server: ForkServer, tmp_path: Path) -> None:
    program = tmp_path / "gradients.py"
    program.write_text(PROGRAM)
    printed = server.run(2, tmp_path, '{"exact": false}', program=program)
    assert "differ: 0" not in printed and printed.count("differ: ") == 2


def test_a_gpu_waits_for_messages_beside_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets are sent from the stream that computed them, and summed and put back on another."""
    calls: list[tuple[str, str]] = []
    streams = ["backward"]

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    def note(call: str) -> Any:
        return lambda *_: calls.append((call, streams[-1])) or torch.ones(2)

    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "stream", on)
    exchange: Any = SimpleNamespace(start=note("start"), add_up=note("add_up"), finish=note("finish"))
    parameter = type("OnGpu", (), {"is_cuda": True})()
    buckets = _Buckets(Subtrees(1, note("add")), [parameter], 0, exchange, Pace(torch.device("cpu")))
    monkeypatch.setattr(buckets, "_pieces", lambda bucket: [bucket.buffer()])
    buffers = [torch.zeros(2) for _ in range(3)]
    given = [SimpleNamespace(buffer=lambda at=i: buffers[at], is_last=lambda at=i: at == 2) for i in range(3)]
    futures = [buckets.exchange(None, bucket) for bucket in given]
    started, summed, put_back = ("start", "backward"), ("add_up", "side"), ("finish", "side")
    assert calls == [started, started, summed, started, summed, summed, *[put_back] * 3]
    assert all(future.value() is buffer and buffer.sum() == 2 for future, buffer in zip(futures, buffers, strict=True))
