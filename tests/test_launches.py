"""The promise: the same training on every launch. Real processes, started by `accelerate launch`, compared bit by bit.

In float64 rounding is 1e-16 and cannot hide a difference in order, randomness or statistics, which would be of the
size of a step. The learning rate is low enough that training does not amplify rounding itself: at 0.003 and
microbatches of 16, one thread against two of the same launch are 1e-9 apart after 20 steps. Adam (which divides a
rounding error by its epsilon of 1e-8) and an L1 penalty (whose gradient jumps at 0) amplify it in one step.
"""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, finish, launch, read_lines, start, wait_for_step

from lockstep.commands.compare import relative_differences
from lockstep.models.weights import load_weights

pytestmark = pytest.mark.launch

PROOF = (
    "--runtime.dtype=float64",
    "--runtime.threads=1",
    "--augment.mean=[0.3]",
    "--augment.std=[0.4]",
    "--model.name=fashion_cnn",
    "--model.dropout=0.3",
    "--train.batch_size=256",
    "--train.micro_batch_size=64",
    "--train.epochs=3",
    "--checkpoint.every_epochs=1",
    "--optim.name=sgd",
    "--optim.lr=0.002",
    "--optim.momentum=0.9",
    "--schedule.name=constant",
    "--log.every_steps=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
)
EVERYTHING = (
    "--augment.mixup=0.4",
    "--augment.cutmix=1.0",
    "--augment.erasing=0.3",
    "--train.ema_decay=0.9",
    "--optim.clip_norm=0.5",
    "--schedule.name=plateau",
    "--schedule.patience=0",
    "--data.sampling=balanced",
    "--data.repeats=2",
)


def train_on(processes: int, place: Path, name: str, *settings: str) -> Path:
    arguments = (*PROOF, *settings, f"--run.name={name}", f"--data.cache_dir={place / 'cache'}")
    done = launch(*arguments, cwd=place, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    run = place / "runs" / name
    entry = json.loads((run / "environment.json").read_text())[-1]
    # A test that does not see all processes at work proves nothing.
    assert (entry["processes"], entry["accumulation"]) == (processes, 4 // processes)
    return run


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in read_lines(run)]


def assert_same_training(a: Path, b: Path) -> None:
    for file in ("model.safetensors", "ema.safetensors"):
        weights = [run / "checkpoints" / "last" / file for run in (a, b)]
        assert weights[0].exists() == weights[1].exists()
        if weights[0].exists():
            differences = relative_differences(*(load_weights(path) for path in weights))
            worst = max(differences, key=lambda name: differences[name])
            assert differences[worst] <= 1e-12, f"{worst}: {differences[worst]}"
    lines = [without_times(run) for run in (a, b)]
    assert len(lines[0]) == len(lines[1]) == 15 + 3 + 1
    for one, other in zip(*lines, strict=True):
        assert one.pop("split") == other.pop("split")
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("settings", [(), EVERYTHING], ids=["plain", "everything"])
def test_1x4_2x2_and_4x1_are_one_training(settings: tuple[str, ...], tmp_path: Path) -> None:
    alone = train_on(1, tmp_path, "alone", *settings)
    streamed = (*settings, "--data.memory_budget=0", "--data.workers=2")
    assert_same_training(alone, train_on(2, tmp_path, "pair", *streamed))
    if not settings:
        assert_same_training(alone, train_on(4, tmp_path, "four"))


def test_the_proof_would_notice_another_order(tmp_path: Path) -> None:
    a = train_on(1, tmp_path, "a", "--train.max_steps=2")
    b = train_on(1, tmp_path, "b", "--train.max_steps=2", "--run.seed=1")
    differences = relative_differences(*(load_weights(run / "checkpoints/last/model.safetensors") for run in (a, b)))
    assert max(differences.values()) > 1e-3


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_a_compiled_run_goes_on_uncompiled(tmp_path: Path) -> None:
    """With dropout, which the compiler would draw its own way."""
    settings = (*PROOF, "--model.name=tiny_cnn", "--train.max_steps=60", "--train.epochs=20")
    settings += (f"--data.cache_dir={tmp_path / 'cache'}",)
    program = [sys.executable, str(ROOT / "train.py"), *settings]
    whole = finish(start([*program, "--run.name=whole"], tmp_path), 120)
    assert whole.returncode == 0, whole.stderr[-3000:]
    run = tmp_path / "runs" / "compiled"
    process = start([*program, "--runtime.compile=true", "--run.name=compiled"], tmp_path)
    wait_for_step(run, 1, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 60)
    assert 1 <= json.loads((run / "summary.json").read_text())["steps"] < 60
    resumed = finish(start([*program, "--run.name=compiled"], tmp_path), 120)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    starts = json.loads((run / "environment.json").read_text())
    assert ["--runtime.compile=true" in entry["command"] for entry in starts] == [True, False]
    weights = [load_weights(place / "checkpoints/last/model.safetensors") for place in (run, run.with_name("whole"))]
    assert max(relative_differences(*weights).values()) <= 1e-12
