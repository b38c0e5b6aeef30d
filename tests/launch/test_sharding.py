"""FSDP2 on real processes: the same training as without it, and checkpoints that either can go on from."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from programs import ROOT, finish, launch_command, ranks_of, start, wait_for_step
from test_launches import EVERYTHING, PROOF, assert_same_training
from torch import nn

pytestmark = pytest.mark.launch

ALONE = [sys.executable, str(ROOT / "train.py")]


def test_one_training_begins_whole_goes_on_sharded_and_ends_whole(tmp_path: Path) -> None:
    settings = (*PROOF, *EVERYTHING, f"--data.cache_dir={tmp_path / 'cache'}")
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
        assert summary["state"] == "preempted" and stop_at <= summary["steps"] < 15
    resumed = finish(start([*ALONE, *settings, "--run.name=moved"], tmp_path), 120)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    starts = [(entry["processes"], entry["fsdp"]) for entry in json.loads((run / "environment.json").read_text())]
    assert starts == [(1, False), (2, True), (1, False)]
    assert_same_training(tmp_path / "runs" / "alone", run)


PARTS = """
import torch, json, sys
from accelerate import Accelerator
from torch import nn
from lockstep.launch.accelerator import Launch
from lockstep.launch.sharding import gathered, local, part_of, shard, whole

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
before = {name: value.clone() for name, value in model.state_dict().items()}
launch = Launch(accelerator.device, accelerator.num_processes, 0, 0, "no", 1, is_sharded=True)
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
torch.distributed.destroy_process_group()
"""


def test_parts_make_up_the_whole_and_gathered_weights_need_nobody(tmp_path: Path) -> None:
    """Three processes, among which no dimension of the network divides."""
    (tmp_path / "parts.py").write_text(PARTS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "parts.py"]
    done = finish(start(command, tmp_path), 120)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert sum(result["counts"]) == 15 + 5 + 5 + 5 + 10 + 2 and max(result["counts"]) < 42 / 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()
    assert torch.allclose(model(torch.ones(2, 3)), torch.tensor(result["logits"]))
