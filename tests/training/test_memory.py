"""The microbatch that fits, and running out of memory for real."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from programs import LAUNCHER, QUICK, ROOT, finish, start

from lockstep.training import memory

AUTO = (*QUICK, "--train.batch_size=256", "--train.micro_batch_size=auto", "--train.epochs=1", "--run.name=auto")


def limit_memory(monkeypatch: pytest.MonkeyPatch, mebibytes: float) -> None:
    available = SimpleNamespace(available=mebibytes * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)


def started_with(run: Path) -> tuple[int, int]:
    """Microbatch and accumulation of the last start."""
    summary = json.loads((run / "summary.json").read_text())
    return summary["micro_batch_size"], json.loads((run / "environment.json").read_text())[-1]["accumulation"]


def test_auto_takes_the_whole_share_where_it_fits(train_here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert started_with(train_here(*AUTO)) == (256, 1)
    assert "--train.micro_batch_size=auto: 256 is the largest that fits" in capsys.readouterr().out


def test_auto_keeps_the_batch_by_accumulation_and_its_choice_for_life(
    train_here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # fashion_cnn keeps 0.1 MiB for each digit, and as much again is reckoned with.
    limit_memory(monkeypatch, 10)
    run = train_here(*AUTO, "--train.max_steps=2", "--run.max_hours=0.0000001")
    size, accumulation = started_with(run)
    assert size in (16, 32, 64) and size * accumulation == 256
    limit_memory(monkeypatch, 10_000)
    capsys.readouterr()
    assert started_with(train_here(*AUTO, "--train.max_steps=2")) == (size, accumulation)
    assert "largest that fits" not in capsys.readouterr().out, "it was found once"


def test_a_sample_that_does_not_fit_is_refused(train_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 0.01)
    with pytest.raises(ValueError, match="not even a microbatch of one sample fits into the memory of cpu"):
        train_here(*AUTO)


def test_on_other_devices_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def step(size: int, *_: object) -> None:
        tried.append(size)
        if size > 24:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "_try_step", step)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    elsewhere: Any = SimpleNamespace(device=torch.device("cuda"))
    nothing: Any = None
    assert [memory._fits(size, nothing, nothing, elsewhere, nothing) for size in (96, 48, 24)] == [False, False, True]
    assert tried == [96, 48, 24]


def test_the_estimate_grows_with_the_image_and_not_with_the_number_of_samples(
    train_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for backward: 8 samples at once must not count as one, nor the weights as samples."""
    estimates = []
    estimate = memory._bytes_per_sample
    monkeypatch.setattr(memory, "_bytes_per_sample", lambda *parts: estimates.append(estimate(*parts)) or estimates[-1])
    for side in (32, 64):
        data = (f"--data.source=synthetic:{side}x{side}x1x600", "--model.name=cifar10_cnn")
        train_here(*AUTO, *data, f"--run.name=side{side}", "--train.max_steps=1")
    small, large = estimates
    assert 3 < large / small < 6  # 4 times the pixels, and a smaller share of them lost at the edges
    # The first two convolutions alone leave 32 channels each, for themselves and for what follows.
    assert 2 * 4 * 2 * 32 * 64 * 64 < large < 30 * 4 * 2 * 32 * 64 * 64


HUNGRY = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import psutil, train
from lockstep.errors import one_line_errors
from lockstep.settings.cli import parse_config

limit = psutil.Process().memory_info().vms + 800 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with one_line_errors():
    train.train(parse_config(sys.argv[1:]))
"""


@pytest.mark.launch
def test_running_out_of_memory_names_the_setting_to_lower(tmp_path: Path) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    sizes = ("--train.batch_size=2000", "--train.micro_batch_size=2000", "--runtime.threads=1")
    settings = (*QUICK, "--data.source=synthetic:32x32x3x4000", "--model.name=cifar10_cnn", *sizes)
    done = finish(start([sys.executable, "hungry.py", *settings, f"--data.cache_dir={tmp_path}"], tmp_path), 120)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "lower --train.micro_batch_size=2000" in error and "--train.batch_size=2000 can stay" in error


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_that_left_its_microbatch_open_keeps_it_on_other_launches(tmp_path: Path) -> None:
    """Its first start had 2 processes; microbatches twice as large on one would be another training."""
    pair = [*LAUNCHER, "--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml"), str(ROOT / "train.py")]
    settings = (*QUICK, "--train.micro_batch_size=null", "--run.name=open", f"--data.cache_dir={tmp_path}")
    done = finish(start([*pair, *settings, "--run.max_hours=0.0000001"], tmp_path), 120)
    assert "saved; the same command continues" in done.stdout, done.stderr[-2000:]
    assert started_with(tmp_path / "runs" / "open") == (128, 1)
    done = finish(start([sys.executable, str(ROOT / "train.py"), *settings], tmp_path), 120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert started_with(tmp_path / "runs" / "open") == (128, 2)
