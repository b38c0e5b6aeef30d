"""What is said of torch.compile before training."""

from typing import Any

import pytest
import torch

from lockstep.launch.accelerator import Launch
from lockstep.settings.config import Config, RuntimeConfig, TrainConfig
from lockstep.training.gain import say_gain_of_compiling

NOBODY: Any = None  # nothing is built before the settings are looked at
LAUNCH = Launch(torch.device("cpu"), 2, 0, 0, "no", 1)


def test_nothing_is_said_where_nothing_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    say_gain_of_compiling(Config(), NOBODY, NOBODY, LAUNCH, 32)
    assert capsys.readouterr().out == ""


def test_cuda_graphs_and_sums_over_microbatches_do_not_go_together() -> None:
    config = Config(runtime=RuntimeConfig(compile="reduce-overhead"), train=TrainConfig(batch_size=128))
    with pytest.raises(ValueError, match="set --train.micro_batch_size so that a step has one on each process"):
        say_gain_of_compiling(config, NOBODY, NOBODY, LAUNCH, 32)
