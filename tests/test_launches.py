"""The promise: the same training on every launch, bit for bit, in the precision people train in.

Everything that a training leaves is compared: weights, running statistics, average, optimizer, and every figure of
metrics.jsonl but speeds. The learning rate is one at which training amplifies any other rounding within these steps.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import ForkServer
from launches import AUGMENTED, FINE_TUNING, NETWORKS, PROOF, train_on
from PIL import Image
from programs import ROOT, finish, launch, launch_command, start, wait_for_step
from runs import differences
from sources import tar_of_folder

from lockstep.commands.compare import relative_differences
from lockstep.models.weights import load_weights
from lockstep.run.history import read_starts

pytestmark = pytest.mark.launch


@pytest.mark.parametrize(
    ("precision", "network"),
    [
        ("no", "fashion_cnn"),
        ("bf16", "resnet"),
        pytest.param("no", "resnet", marks=pytest.mark.slow),
        pytest.param("bf16", "fashion_cnn", marks=pytest.mark.slow),
    ],
)
def test_1_2_3_and_4_processes_are_one_training(
    precision: str, network: str, server: ForkServer, tmp_path: Path
) -> None:
    """With microbatches of uneven numbers a process, and streamed from workers, too."""
    settings = (*NETWORKS[network], f"--runtime.precision={precision}")
    alone = train_on(server, 1, tmp_path, *settings)
    assert len((alone / "metrics.jsonl").read_text().splitlines()) >= 12 + 1
    assert differences(train_on(server, 2, tmp_path, *settings), alone) == []
    assert differences(train_on(server, 3, tmp_path, *settings), alone) == []
    assert differences(train_on(server, 4, tmp_path, *settings), alone) == []


def test_several_ddp_buckets_and_streamed_images_change_nothing(server: ForkServer, tmp_path: Path) -> None:
    """DDP's first bucket holds 1 MiB, and after the first step it deals parameters anew."""
    wide = ("--model.name=fashion_cnn", "--model.width=64", "--augment.mean=[0.3]", "--augment.std=[0.4]")
    alone = train_on(server, 1, tmp_path, *wide)
    streamed = train_on(server, 4, tmp_path, *wide, "--data.memory_budget=0", "--data.workers=1")
    assert differences(streamed, alone) == []


@pytest.mark.slow
def test_tar_shards_are_the_folder_that_they_were_made_of(server: ForkServer, tmp_path: Path) -> None:
    """The folder in memory on one process; the shards on two, streamed by workers that share their handles."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 20)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / f"images/{split}/{name}/{number}.png")
    shards = tar_of_folder(tmp_path / "images", tmp_path / "shards", ("train", "val"))
    settings = ("--model.name=tiny_cnn", "--augment.mean=[0.3]", "--augment.std=[0.4]", "--train.epochs=12")
    folder = train_on(server, 1, tmp_path / "folder", *settings, f"--data.source=folder:{tmp_path}/images")
    streamed = (f"--data.source={shards}", "--data.memory_budget=0", "--data.workers=2")
    tar = train_on(server, 2, tmp_path / "tar", *settings, *streamed)
    (identity,) = differences(tar, folder)
    assert identity.startswith("summary.json"), "the files are others, and nothing else is"


def test_the_proof_would_notice_another_order(server: ForkServer, tmp_path: Path) -> None:
    """A step sums 8 microbatches one after the other, or twice 4 of them: that is enough to be another training."""
    alone, pair = (train_on(server, processes, tmp_path, "--runtime.exact=false") for processes in (1, 2))
    assert {"model of last", "ema of last", "optimizer of last", "its values"} <= set(differences(pair, alone))
    weights = [load_weights(run / "checkpoints/last/model.safetensors") for run in (alone, pair)]
    assert 0 < max(relative_differences(*weights).values())


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_accelerate_launch_starts_the_same_training(processes: int, server: ForkServer, tmp_path: Path) -> None:
    """As a user starts it."""
    alone = train_on(server, 1, tmp_path)
    done = launch(
        *(*PROOF, "--run.name=proof", f"--data.cache_dir={tmp_path / 'cache'}"), cwd=tmp_path, processes=processes
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "proof"
    assert read_starts(run)[0]["processes"] == processes and differences(run, alone) == []


@pytest.mark.slow
def test_the_settings_of_recipes_keep_the_promise_on_3_processes_and_through_a_kill(
    server: ForkServer, tmp_path: Path
) -> None:
    settings = (*NETWORKS["resnet"], *FINE_TUNING, *AUGMENTED)
    alone = train_on(server, 1, tmp_path, *settings)
    assert differences(train_on(server, 3, tmp_path, *settings), alone) == []
    weights = [load_weights(alone / "checkpoints" / f"step_000000{step}/model.safetensors") for step in ("15", "16")]
    still = {name for name, value in weights[0].items() if torch.equal(value, weights[1][name])}
    assert {"layer1.0.bn1.weight", "layer1.0.bn1.running_mean"} <= still, "what is frozen stays"
    assert not {"bn1.weight", "layer2.0.bn1.running_mean", "layer2.0.conv1.weight", "fc.weight"} & still

    folder = tmp_path / "killed"
    folder.mkdir()
    arguments = (*PROOF, *settings, "--run.name=proof", f"--data.cache_dir={tmp_path / 'cache'}")
    process = start([*launch_command(2, "train.py"), *arguments], folder)
    wait_for_step(folder / "runs" / "proof", 7, process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process, 30)
    server.run(1, folder, *arguments)
    run = folder / "runs" / "proof"
    assert [entry["processes"] for entry in read_starts(run)] == [2, 1] and differences(run, alone) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_a_compiled_run_goes_on_uncompiled(tmp_path: Path) -> None:
    """With dropout, which the compiler would draw its own way; in float64, where its rounding stays small."""
    settings = (*PROOF, "--runtime.dtype=float64", "--optim.lr=0.001", "--model.name=tiny_cnn", "--model.dropout=0.3")
    settings += ("--train.max_steps=60", "--train.epochs=20", f"--data.cache_dir={tmp_path / 'cache'}")
    program = [sys.executable, str(ROOT / "train.py"), *settings]
    whole = finish(start([*program, "--run.name=whole"], tmp_path), 120)
    assert whole.returncode == 0, whole.stderr[-3000:]
    run = tmp_path / "runs" / "compiled"
    process = start([*program, "--runtime.compile=default", "--run.name=compiled"], tmp_path)
    wait_for_step(run, 1, process)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process, 60)
    assert "times as fast" in stopped.stdout and "torch/_dynamo" not in stopped.stderr
    assert 1 <= json.loads((run / "summary.json").read_text())["steps"] < 60
    resumed = finish(start([*program, "--run.name=compiled"], tmp_path), 120)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert ["--runtime.compile=default" in entry["command"] for entry in read_starts(run)] == [True, False]
    weights = [load_weights(place / "checkpoints/last/model.safetensors") for place in (run, run.with_name("whole"))]
    assert max(relative_differences(*weights).values()) <= 1e-12
