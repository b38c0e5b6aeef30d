"""What bits depend on: written down, compared, kept, and said when it leaves the promise."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from lockstep.launch.accelerator import Launch
from lockstep.launch.machine import cpu_model
from lockstep.launch.numerics import describe_changes, describe_exactness, numerics_of, sums_in_order
from lockstep.settings.config import RuntimeConfig

LAUNCH = Launch(torch.device("cpu"), 2, 0, 0, "bf16", 4)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_numerics_say_what_bits_depend_on() -> None:
    torch.set_num_threads(2)
    assert numerics_of(RuntimeConfig(), LAUNCH) == {
        "device": cpu_model(),
        "precision": "bf16",
        "threads": 2,
        "torch": torch.__version__,
        "exact": True,
        "compile": False,
    }
    float64 = numerics_of(RuntimeConfig(dtype="float64"), replace(LAUNCH, precision="no"))
    assert float64["precision"] == "fp64"
    assert "2" not in cpu_model() or cpu_model() != "x86_64", "a CPU is known by its model, not its architecture"


def test_the_number_of_processes_is_no_part_of_them() -> None:
    assert numerics_of(RuntimeConfig(), LAUNCH) == numerics_of(RuntimeConfig(), replace(LAUNCH, num_processes=7))


def test_portable_bits_are_those_of_any_cpu() -> None:
    launch = replace(LAUNCH, precision="no")
    assert numerics_of(RuntimeConfig(portable=True), launch)["device"] == "any x86-64 CPU with AVX2"


def test_changes_are_named() -> None:
    before = {"device": "A", "threads": 2, "exact": True}
    assert describe_changes(before, before) == ""
    assert describe_changes(before, {"device": "B", "exact": True, "cuda": "13"}) == (
        "device A -> B, threads 2 -> None, cuda None -> 13"
    )


def test_settings_that_leave_the_promise_say_so() -> None:
    assert describe_exactness(RuntimeConfig(), LAUNCH) is None and sums_in_order(RuntimeConfig())
    for config in (
        RuntimeConfig(exact=False),
        RuntimeConfig(compress_gradients=True),
        RuntimeConfig(sync_batchnorm=True),
        RuntimeConfig(compile="default"),
    ):
        line = describe_exactness(config, LAUNCH)
        assert line is not None and line.startswith("note: with --runtime.") and "docs/sameness.md" in line
    assert not sums_in_order(RuntimeConfig(compress_gradients=True)) and not sums_in_order(RuntimeConfig(exact=False))
