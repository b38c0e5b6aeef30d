"""What a run does without, and gets when it needs it."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, warnings
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
{then}
"""


@pytest.mark.parametrize(
    "then",
    [
        "",
        "import torch._dynamo.config; assert has_compiler()",
        "torch._dynamo.reset(); assert has_compiler()",
        "from torch._dynamo.utils import counters; assert has_compiler()",
        "model.compile(backend='eager'); model(torch.ones(1, 2)); assert has_compiler()",
    ],
)
def test_the_compiler_is_imported_when_something_needs_it(then: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(then=then)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
