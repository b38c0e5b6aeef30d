"""Steps without a finite gradient, in whole trainings: skipped, counted, and gone back from if they do not end."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import LAUNCHER, QUICK, ROOT, finish, free_port, launch, read_lines, start
from torch import Tensor

from lockstep.commands.compare import relative_differences
from lockstep.models.weights import load_weights
from lockstep.settings.config import TrainConfig
from lockstep.training import learner, loss
from lockstep.training.loss import Loss

# 10 steps of 2 microbatches; every step is logged, so that a row of bad ones is noticed at its end.
SHORT = (
    *QUICK,
    "--train.batch_size=256",
    "--train.micro_batch_size=128",
    "--log.every_steps=1",
    "--runtime.threads=1",
    "--runtime.dtype=float64",
    "--optim.lr=0.002",
)


def spoiling(spoils: Callable[[int], bool], by: float = math.nan) -> Callable[..., Loss]:
    """A build_loss whose losses are `by` in the calls (counted from 0, over restarts too) that `spoils` names."""
    build_loss, calls = loss.build_loss, iter(range(10**9))

    def build(config: TrainConfig, weights: Tensor | None) -> Loss:
        loss_of = build_loss(config, weights)

        def spoilt(logits: Tensor, targets: Tensor) -> Tensor:
            losses = loss_of(logits, targets)
            return losses + by if spoils(next(calls)) else losses

        return spoilt

    return build


@pytest.fixture
def train_spoilt(train_here: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`train_spoilt(name, spoils, *settings)` trains in this process and returns the run folder."""

    def run(name: str, spoils: Callable[[int], bool], *settings: str, by: float = math.nan) -> Path:
        monkeypatch.setattr(learner, "build_loss", spoiling(spoils, by))
        return train_here(*SHORT, f"--run.name={name}", *settings)

    return run


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_weights(run / "checkpoints" / "last" / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_bad_step_is_skipped_and_counted_whatever_made_it_bad(train_spoilt: Any) -> None:
    whole = weights_of(train_spoilt("whole", lambda call: False))
    runs = [
        train_spoilt("first_microbatch", lambda call: call == 4, by=math.inf),
        train_spoilt("second_microbatch", lambda call: call == 5, by=math.nan),
        train_spoilt("both", lambda call: call in (4, 5), by=-math.inf),
    ]
    for run in runs:
        weights = weights_of(run)
        assert all(value.isfinite().all() for value in weights.values())
        assert equal(weights, weights_of(runs[0])) and not equal(weights, whole)
        lines = [line for line in read_lines(run) if line["split"] == "train"]
        assert [line["step"] for line in lines if "bad_steps" in line] == [3], "calls 4 and 5 are the third step"
        assert lines[2]["bad_steps"] == 1 and lines[2]["loss"] == "NaN", "it has no loss to report"
        assert all(0 < line["loss"] < 5 for line in lines if line["step"] != 3)
        assert json.loads((run / "summary.json").read_text())["bad_steps"] == 1


def test_a_passing_fault_costs_a_return_to_the_last_checkpoint_and_nothing_else(
    train_spoilt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train_spoilt("whole", lambda call: False)
    capsys.readouterr()
    # Steps 6 to 8 of the first pass; the checkpoint before is that of step 5, at the end of an epoch.
    run = train_spoilt("faulty", lambda call: 10 <= call < 16, "--train.max_bad_steps=3")
    printed = capsys.readouterr().out
    assert printed.count("Going back to the last checkpoint, once") == 1 and "steps 6 to 8 " in printed
    assert f"continuing {Path('runs') / 'faulty'} after step 5" in printed
    assert equal(weights_of(run), weights_of(whole))
    lines = [[(line["split"], line["step"], line["loss"]) for line in read_lines(r)] for r in (run, whole)]
    assert lines[0] == lines[1], "the steps gone back from are not in the log"


def test_a_row_that_ends_in_time_is_left_behind(train_spoilt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_spoilt("lucky", lambda call: 10 <= call < 14 or call in (16, 18), "--train.max_bad_steps=3")
    assert "Going back" not in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["bad_steps"] == 4


def test_the_second_time_it_stops_and_names_the_samples(train_spoilt: Any, tmp_path: Path) -> None:
    from lockstep.report.summary import Diverged

    with pytest.raises(Diverged, match=r"diverged: steps 6 to 8 had no finite loss or gradient .*bad_step\.json"):
        train_spoilt("hopeless", lambda call: call >= 10, "--train.max_bad_steps=3")
    run = tmp_path / "runs" / "hopeless"
    saved = json.loads((run / "bad_step.json").read_text())
    assert saved["step"] == 8
    flat = [sample for microbatch in saved["samples"] for sample in microbatch]
    assert [len(microbatch) for microbatch in saved["samples"]] == [128, 128] and len(set(flat)) == 256
    assert json.loads((run / "summary.json").read_text())["state"] == "failed"
    # The same command goes on from the checkpoint before, with another cause gone.
    assert json.loads((train_spoilt("hopeless", lambda call: False) / "summary.json").read_text())["bad_steps"] == 0


def test_a_training_of_bad_steps_alone_is_no_success(train_spoilt: Any, tmp_path: Path) -> None:
    """Also where it has fewer steps than max_bad_steps: it ended as finished."""
    from lockstep.report.summary import Diverged

    with pytest.raises(Diverged, match=r"diverged: steps 1 to 10 had no finite loss or gradient"):
        train_spoilt("nothing", lambda call: True, "--train.max_bad_steps=100")
    summary = json.loads((tmp_path / "runs" / "nothing" / "summary.json").read_text())
    assert summary["state"] == "failed" and "test_accuracy" not in summary


LONELY_FAULT = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import train
from lockstep.training import learner
from lockstep.settings.cli import parse_config
from test_bad_steps import spoiling

rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# Microbatch 1 of step 3: the third call of rank 1, or call 5 of a process alone.
faulty = (lambda call: rank == 1 and call == 2) if processes == 2 else (lambda call: call == 5)
learner.build_loss = spoiling(faulty)
train.train(parse_config(sys.argv[1:]))
train.end_program()
"""


@pytest.mark.slow
@pytest.mark.launch
def test_a_fault_on_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(LONELY_FAULT)
    config = str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")
    pair = [*LAUNCHER, "--config_file", config, "--main_process_port", str(free_port())]
    alone = tmp_path / "runs" / "alone"
    for name, command in (("alone", [sys.executable]), ("pair", pair)):
        settings = (*SHORT, "--optim.name=sgd", f"--run.name={name}", f"--data.cache_dir={tmp_path}")
        done = finish(start([*command, "faulty.py", *settings], tmp_path), 120)
        assert done.returncode == 0, done.stderr[-3000:]
        run = alone.with_name(name)
        entry = json.loads((run / "environment.json").read_text())[0]
        assert entry["processes"] == (1 if name == "alone" else 2)
        counts = [[line.get("bad_steps") for line in read_lines(one)] for one in (run, alone)]
        assert counts[0] == counts[1]
        assert json.loads((run / "summary.json").read_text())["bad_steps"] == 1
        assert max(relative_differences(weights_of(alone), weights_of(run)).values()) < 1e-12


@pytest.mark.slow
@pytest.mark.launch
def test_weights_that_overflow_are_not_saved_and_end_the_run_with_advice(tmp_path: Path) -> None:
    settings = (*QUICK, "--optim.name=sgd", "--optim.lr=1e30", "--train.epochs=4", "--train.max_bad_steps=2")
    done = launch(*settings, "--log.every_steps=1", "--run.name=wild", cwd=tmp_path, processes=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "diverged" in errors[0] and "--optim.lr" in errors[0]
    assert not list((tmp_path / "runs" / "wild" / "checkpoints").glob("step_*"))
