"""Checks of a launch: batches, cores and ports that do not fit, and sums that are wrong."""

import os

import pytest
import torch

from lockstep.checks.finding import Parts
from lockstep.checks.launch import check_all_reduce, check_batch, check_cores, check_port
from lockstep.launch.accelerator import Launch, build_accelerator
from lockstep.settings.config import Config, RuntimeConfig, TrainConfig


def test_a_batch_that_does_not_fit_the_processes_and_processes_that_do_not_fit_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    many = Launch(torch.device("cpu"), cores + 1, 0, 0, "no", 1)
    parts = Parts(Config(train=TrainConfig(batch_size=8 * (cores + 1) + 1)), launch=many)
    with pytest.raises(ValueError, match="is not a multiple"):
        check_batch(parts)
    assert f"{cores + 1} processes share {cores} cores" in check_cores(parts).text


def test_a_microbatch_is_proposed_where_it_is_left_open() -> None:
    train = TrainConfig(batch_size=256, micro_batch_size=None)
    found = check_batch(Parts(Config(train=train), launch=Launch(torch.device("cpu"), 4, 0, 0, "no", 1)))
    assert found.status == "warning" and "4 microbatches of 64" in found.text
    assert "with --train.micro_batch_size=32, any number up to 8 trains the same" in found.text


@pytest.mark.parametrize("value", ["", "x", "-1", "99999"])
def test_what_is_no_port_is_a_warning_for_one_process(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", value)
    found = check_port(Parts(Config()))
    assert found and found.status == "warning" and found.text.startswith(f"MASTER_PORT={value!r} in the environment is")


def test_a_wrong_sum_fails(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes part with another number of partners than it believes gets another sum."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    accelerator, _ = build_accelerator(RuntimeConfig())
    believed = Launch(torch.device("cpu"), 2, 0, 0, "no", 1)
    finding = check_all_reduce(Parts(Config(), accelerator, believed))
    assert finding and finding.status == "failed" and "came to 1 instead of 3" in finding.text
