"""Where the time went, in a line; and the share of the machine's peak."""

import pytest
import torch
from torch import nn

from lockstep.launch.accelerator import Launch
from lockstep.models.summary import forward_flops
from lockstep.report import account
from lockstep.report.account import describe_account, measure_peak, share_of_peak

LAUNCH = Launch(torch.device("cpu"), 2, 0, 0, "bf16", 1)
SOUND = {
    "compute_share": 0.9,
    "data_share": 0.05,
    "validation_share": 0.04,
    "saving_share": 0.01,
    "logging_share": 0.001,
    "waiting_share": 0.0,
    "started_seconds": 6.84,
    "peak_share": 0.19,
}


@pytest.fixture(autouse=True, params=[True, False])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this CPU has instructions for bf16."""
    monkeypatch.setattr(account, "has_fast_bf16", lambda on_cpu: request.param)
    return bool(request.param)


def test_the_line_tells_what_took_time(fast: bool) -> None:
    line = describe_account(SOUND, LAUNCH, streams=True)
    peak = "bf16" if fast else "fp32"
    expected = f"time: compute 90%, data 5%, validation 4%, saving 1%; computing at 19% of this machine's {peak} peak"
    assert line == f"{expected}; started in 6.8 s"


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("data_share", "--data.workers"),
        ("validation_share", "--train.validate_every_epochs"),
        ("saving_share", "--checkpoint.every_steps"),
        ("logging_share", "--log.every_steps"),
        ("waiting_share", "straggler_rank"),
    ],
)
def test_what_takes_too_much_comes_with_advice(key: str, advice: str) -> None:
    assert advice not in describe_account(SOUND, LAUNCH, streams=True)
    assert advice in describe_account({**SOUND, key: 0.5}, LAUNCH, streams=True)
    in_memory = describe_account({**SOUND, key: 0.5}, LAUNCH, streams=False)
    assert (advice in in_memory) == (key != "data_share"), "nobody decodes images that are in memory"


def test_the_share_of_the_peak_is_what_a_step_needs_over_what_a_product_reaches(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    assert forward_flops(model, (3, 2, 2)) == 2 * 12 * 5 and model.training
    wanted = torch.bfloat16 if fast else torch.float32
    monkeypatch.setattr(account, "measure_peak", lambda device, dtype: 3600.0 if dtype == wanted else 0.0)
    assert share_of_peak(model, (3, 2, 2), 10.0, LAUNCH) == pytest.approx(3 * 120 * 10 / (3600 * 2))


def test_the_peak_is_that_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 0.5, 0.25, 1.0, 0.5, 2.0])  # the first one warms up
    monkeypatch.setattr(account, "_seconds_of_product", lambda matrix: next(seconds))
    assert measure_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.5
