"""FSDP2 on real processes: the same bits on any number of them, and checkpoints that either kind can go on from."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from fork_server import ForkServer
from launches import NETWORKS, PROOF, train_on
from programs import ROOT, finish, launch, launch_command, ranks_of, start, wait_for_step
from runs import differences
from torch import nn

from lockstep.commands.compare import relative_differences
from lockstep.models.weights import load_weights
from lockstep.run.history import read_starts

pytestmark = pytest.mark.launch

ALONE = [sys.executable, str(ROOT / "train.py")]


@pytest.mark.slow
def test_1_2_and_4_processes_are_one_training(server: ForkServer, tmp_path: Path) -> None:
    """Clipping and averages included."""
    settings = [*NETWORKS["fashion_cnn"], "--runtime.fsdp=true"]
    alone = train_on(server, 1, tmp_path, *settings)
    for processes in (2, 4):
        sharded = train_on(server, processes, tmp_path, *settings)
        assert read_starts(sharded)[0]["fsdp"] and differences(sharded, alone) == []


@pytest.mark.slow
def test_one_training_begins_whole_goes_on_sharded_and_ends_whole(tmp_path: Path) -> None:
    """To rounding, which float64 and a low learning rate keep small: the kernels of sharded optimizers are others."""
    settings = (*PROOF, "--runtime.dtype=float64", "--optim.lr=0.0005", "--train.micro_batch_size=32")
    settings += (f"--data.cache_dir={tmp_path / 'cache'}",)
    alone = finish(start([*ALONE, *settings, "--run.name=alone"], tmp_path), 120)
    assert alone.returncode == 0, alone.stderr[-3000:]

    run = tmp_path / "runs" / "moved"
    pair = [*launch_command(2, "train.py"), "--runtime.fsdp=true"]
    for command, stop_at in ((ALONE, 3), (pair, 8)):
        process = start([*command, *settings, "--run.name=moved"], tmp_path)
        wait_for_step(run, stop_at, process)
        (ranks_of(process) or [process])[-1].send_signal(signal.SIGUSR2)
        finish(process, 60)
        summary = json.loads((run / "summary.json").read_text())
        assert summary["state"] == "preempted" and stop_at <= summary["steps"] < 12
    resumed = finish(start([*ALONE, *settings, "--run.name=moved"], tmp_path), 120)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert [(entry["processes"], entry["fsdp"]) for entry in read_starts(run)] == [(1, False), (2, True), (1, False)]
    for file in ("model.safetensors", "ema.safetensors"):
        weights = [load_weights(place / "checkpoints/last" / file) for place in (run.with_name("alone"), run)]
        assert max(relative_differences(*weights).values()) <= 1e-9


@pytest.mark.slow
def test_uneven_numbers_of_microbatches_are_refused(tmp_path: Path) -> None:
    done = launch(*PROOF, "--runtime.fsdp=true", cwd=tmp_path, processes=3)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(errors) == 1
    assert "8 do not divide by 3" in errors[0] and "--runtime.exact=false" in errors[0]


PARTS = """
import torch, json
from torch import nn
from lockstep.launch.accelerator import build_accelerator, end_program
from lockstep.launch.sharding import gathered, local, part_of, shard, whole
from lockstep.settings.config import RuntimeConfig

accelerator, launch = build_accelerator(RuntimeConfig(threads=1, fsdp=True))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
before = {name: value.clone() for name, value in model.state_dict().items()}
shard(model, launch, compress_gradients=False)
held = sum(local(parameter).numel() for parameter in model.parameters())
for name, value in model.state_dict().items():
    assert torch.equal(whole(value), before[name]), name
    assert torch.equal(local(part_of(before[name], value)), local(value)), name
model.eval()
images = torch.ones(2, 3)
with torch.no_grad(), gathered(model):
    for _ in range(1 + accelerator.process_index):  # as many as it likes: nobody waits
        logits = model(images)
counts = accelerator.gather(torch.tensor([held])).tolist()
if accelerator.is_main_process:
    print(json.dumps({"counts": counts, "logits": logits.tolist()}))
end_program()
"""


@pytest.mark.slow
def test_parts_make_up_the_whole_and_gathered_weights_need_nobody(server: ForkServer, tmp_path: Path) -> None:
    """Three processes, among which no dimension of the network divides."""
    program = tmp_path / "parts.py"
    program.write_text(PARTS)
    printed = server.run(3, tmp_path, program=program)
    # Where nothing answers for names, c10d says so in lines of its own.
    (result,) = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert sum(result["counts"]) == 15 + 5 + 5 + 5 + 10 + 2 and max(result["counts"]) < 42 / 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()
    assert torch.allclose(model(torch.ones(2, 3)), torch.tensor(result["logits"]))
