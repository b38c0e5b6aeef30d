"""Gradients on real processes: what is left in the parameters is the tree's sum, to the last bit."""

from pathlib import Path

import pytest
from fork_server import ForkServer

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
