"""What a run does without, and gets when it needs it."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
import torch
from torch import nn
from lockstep.launch.accelerator import build_accelerator
from lockstep.settings.config import RuntimeConfig

def has_compiler():
    return "torch._dynamo.eval_frame" in sys.modules

build_accelerator(RuntimeConfig())
model = nn.Linear(2, 2)
for optimizer in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adadelta):
    optimizer = optimizer(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert not has_compiler(), "optimizers fetched the compiler"

def import_a_part():
    import torch._dynamo.config

def read_counters():
    from torch._dynamo.utils import counters

def compile_a_model():
    model.compile(backend="eager")
    model(torch.ones(1, 2))

for need in (import_a_part, read_counters, compile_a_model, lambda: torch._dynamo.reset()):
    if os.fork() == 0:  # each from here, where nothing has needed it yet
        need()
        assert has_compiler(), need
        os._exit(0)
    assert os.wait()[1] == 0, need
"""


@pytest.mark.slow
def test_the_compiler_is_imported_when_something_needs_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
