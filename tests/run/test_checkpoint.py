"""Checkpoints are whole or not there: after damage, a full disk and kills at any moment."""

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from lockstep.files import MANIFEST
from lockstep.launch.accelerator import Launch
from lockstep.models.weights import load_weights, put_weights
from lockstep.run.checkpoint import (
    Checkpointer,
    State,
    find_checkpoint,
    find_newest,
    folder_of,
    load_checkpoint,
    point,
    problem_with,
    prune,
    put_optimizer_state,
    save_checkpoint,
    saved_steps,
)
from lockstep.run.folder import Run
from lockstep.settings.config import CheckpointConfig, Config, OptimConfig, RunConfig
from lockstep.settings.yaml import load_config
from lockstep.training.ema import ExponentialAverage
from lockstep.training.optim import build_optimizer
from lockstep.training.progress import Progress, Validation

LAUNCH = Launch(torch.device("cpu"), 1, 0, 0, "no", 1)
FILES = ("config.yaml", "ema.safetensors", "model.safetensors", "optimizer.pt", "progress.json")
OPTIMIZERS = {
    "momentum": OptimConfig(name="sgd", lr=0.1, momentum=0.9),
    "adamw": OptimConfig(name="adamw", lr=0.01, weight_decay=0.1),
    **{name: OptimConfig(name=name, lr=0.01) for name in ("nadamw", "lion", "adopt", "lamb", "muon")},
}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def network(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 4, 3)).to(
        memory_format=torch.channels_last
    )


class Parts:
    """What train.py hands to a Checkpointer, and steps of training."""

    def __init__(self, run: Run, accelerator: Accelerator, *, seed: int = 0, optimizer: str = "adamw") -> None:
        self.model = network(seed)
        self.average = ExponentialAverage(self.model, 0.9)
        self.optimizer: Any = accelerator.prepare(build_optimizer(OPTIMIZERS[optimizer], self.model))
        self.checkpointer = Checkpointer(run, LAUNCH, accelerator, self.model, self.optimizer, self.average)
        self.run = run

    def restore(self) -> Progress:
        return self.checkpointer.restore(find_checkpoint(self.run, LAUNCH))

    def train(self, steps: range) -> None:
        for step in steps:
            images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(step))
            self.model(images).logsumexp(1).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update(step + 1)

    def state(self) -> dict[str, Tensor]:
        slots = self.optimizer.state_dict()["state"]
        return {
            **self.model.state_dict(),
            **{f"average {name}": value for name, value in self.average.state_dict().items()},
            **{f"slot {i} {name}": value for i, slot in slots.items() for name, value in slot.items()},
        }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name]))]
    assert not different, different


def run_in(folder: Path, **checkpoint: Any) -> Run:
    return Run(folder / "run", Config(run=RunConfig(name="run"), checkpoint=CheckpointConfig(**checkpoint)), {})


def some_state(step: int = 0, size: int = 50) -> State:
    return State(
        model={"weight": torch.full((size,), float(step))},
        optimizer={"state": {0: {"momentum": torch.full((size,), step + 0.5)}}, "param_groups": [{"lr": 0.1}]},
        progress={"step": step},
        ema={"weight": torch.full((size,), -float(step))},
    )


def save(checkpoints: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(checkpoints, step, some_state(step), "a: 1\n")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def sizes_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*") if path.is_file()}


# ---- save and load


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_from_the_saved_bits(tmp_path: Path, optimizer: str, accelerator: Accelerator) -> None:
    run = run_in(tmp_path)
    parts = Parts(run, accelerator, optimizer=optimizer)
    parts.train(range(5))
    progress = Progress(step=5, best_step=3, best_accuracy=1 / 3, restarts=2)
    progress.validations = [Validation(1, 0.1 + 0.2), Validation(2, float("inf"))]
    parts.checkpointer.save(progress, is_best=True)
    parts.checkpointer.wait(must_succeed=True)
    folder = run.checkpoints / "step_00000005"
    assert names_in(folder) == {*FILES, MANIFEST} and problem_with(folder) is None
    assert load_config(folder / "config.yaml") == run.config

    resumed = Parts(run, accelerator, seed=1, optimizer=optimizer)
    assert not torch.equal(resumed.state()["0.weight"], parts.state()["0.weight"])
    restored = resumed.restore()
    assert restored.restarts == 3
    restored.restarts = 2
    assert restored == progress
    assert_same(resumed.state(), parts.state())
    for each in (parts, resumed):
        each.train(range(5, 9))
    assert_same(resumed.state(), parts.state())


def test_a_momentum_in_another_layout_goes_on_the_same() -> None:
    """Sharded runs leave ordinary layouts; the fused kernels would take them for the parameter's own."""
    gradient = torch.randn(3, 4, 2, 2)
    ends = []
    for layout in (torch.channels_last, torch.contiguous_format):
        weight = nn.Parameter(torch.zeros(3, 4, 2, 2).to(memory_format=torch.channels_last))
        optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, fused=True)
        momentum = torch.arange(48.0).view(3, 4, 2, 2).to(memory_format=layout)
        groups = [{**optimizer.state_dict()["param_groups"][0], "fused": None}]
        put_optimizer_state(optimizer, {"state": {0: {"momentum_buffer": momentum}}, "param_groups": groups})
        assert optimizer.param_groups[0]["fused"]
        weight.grad = gradient.to(memory_format=torch.channels_last)
        optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends) and torch.allclose(ends[0], -(0.9 * torch.arange(48.0).view(3, 4, 2, 2) + gradient))


def test_a_new_run_starts_from_nothing(tmp_path: Path, accelerator: Accelerator) -> None:
    assert Parts(run_in(tmp_path), accelerator).restore() == Progress()


def test_training_does_not_reach_into_a_save_under_way(tmp_path: Path, accelerator: Accelerator) -> None:
    run = run_in(tmp_path)
    parts = Parts(run, accelerator)
    parts.train(range(2))
    before = {name: torch.as_tensor(value).clone() for name, value in parts.state().items()}
    progress = Progress(step=2)
    parts.checkpointer.save(progress, is_best=False)
    parts.train(range(2, 6))
    progress.step = 6
    parts.checkpointer.wait(must_succeed=True)
    resumed = Parts(run, accelerator, seed=1)
    assert resumed.restore().step == 2
    assert_same(resumed.state(), before)


def test_a_save_begins_one_thread(tmp_path: Path, accelerator: Accelerator) -> None:
    """Its large operations would begin as many as the loop has, and then there would be too many for the cores."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    model = nn.Linear(1000, 1000)
    optimizer: Any = accelerator.prepare(build_optimizer(OPTIMIZERS["adamw"], model))
    checkpointer = Checkpointer(run_in(tmp_path), LAUNCH, accelerator, model, optimizer, None)
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model.weight.isfinite().all()  # the loop's threads begin
        before = threads()
        checkpointer.save(Progress(step=1), is_best=True)
        checkpointer.wait(must_succeed=True)
        assert threads() == before + 1
        assert torch.get_num_threads() == 3, "those of the loop stay"
    finally:
        torch.set_num_threads(usual)


def test_a_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save_checkpoint(tmp_path, 3, some_state(9), "a: 1\n")
    assert load_checkpoint(folder_of(tmp_path, 3)).progress == {"step": 9}
    assert names_in(tmp_path) == {"step_00000003", "last"}


def test_the_best_weights_come_back_as_their_average(tmp_path: Path, accelerator: Accelerator) -> None:
    parts = Parts(run_in(tmp_path), accelerator)
    for step in range(3):
        parts.train(range(step, step + 1))
        if step == 1:
            average = {name: value.clone() for name, value in parts.average.state_dict().items()}
        parts.checkpointer.save(Progress(step=step + 1), is_best=step == 1)
    parts.checkpointer.load_best()
    assert_same(parts.model.state_dict(), average)


def test_a_copy_steps_in_for_damaged_best_weights(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_in(tmp_path)
    parts = Parts(run, accelerator)
    parts.train(range(1))
    average = {name: value.clone() for name, value in parts.average.state_dict().items()}
    parts.checkpointer.save(Progress(step=1), is_best=True)
    parts.checkpointer.wait(must_succeed=True)
    _truncate(run.checkpoints / "best" / "ema.safetensors")
    parts.train(range(1, 2))
    with caplog.at_level(logging.WARNING):
        parts.checkpointer.load_best()
    assert_same(parts.model.state_dict(), average)
    assert "best is damaged (ema.safetensors has" in caplog.text and "best_copy" in caplog.text
    _truncate(run.checkpoints / "best_copy" / "ema.safetensors")
    with pytest.raises(ValueError, match="best cannot be used: .*; nor can its copy .*best_copy"):
        parts.checkpointer.load_best()


def test_best_is_repaired_after_a_kill_before_its_link(tmp_path: Path, accelerator: Accelerator) -> None:
    run = run_in(tmp_path, keep_last=3)
    parts = Parts(run, accelerator)
    for step, best_step in ((1, 1), (2, 2), (3, 2)):
        parts.checkpointer.save(Progress(step=step, best_step=best_step), is_best=step == best_step)
    parts.checkpointer.wait(must_succeed=True)
    assert os.readlink(run.checkpoints / "best") == "step_00000002"
    parts.restore()
    assert os.readlink(run.checkpoints / "best") == "step_00000002", "3 is not the best"
    shutil.rmtree(folder_of(run.checkpoints, 3))
    point(run.checkpoints, "best", folder_of(run.checkpoints, 1))  # as a kill would have left it
    parts.restore()
    assert os.readlink(run.checkpoints / "best") == "step_00000002"


# ---- damage


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, r"^{name} has \d+ bytes instead of \d+$"),
    "one bit altered": (_alter, "^{name} was altered$"),
    "deleted": (Path.unlink, "^{name} is missing$"),
    "a folder": (_replace_by_folder, r"^{name} has \d+ bytes instead of \d+$|not readable"),
}
MANIFESTS: dict[str, tuple[str | None, str]] = {
    "missing": (None, "^manifest.json is missing$"),
    "empty": ("", "^manifest.json is not readable"),
    "cut short": ('{"model.safetensors": {"byt', "^manifest.json is not readable"),
    "a list": ("[]", "^manifest.json "),
    "a number": ("3", "^manifest.json is not readable"),
    "without files": ("{}", "^manifest.json does not list config.yaml$"),
    "without sums": (json.dumps({name: {} for name in FILES}), "^manifest.json is not readable"),
    "other values": (json.dumps(dict.fromkeys(FILES, 5)), "^manifest.json is not readable"),
}


def assert_the_one_before_is_used(checkpoints: Path, problem: str, caplog: pytest.LogCaptureFixture) -> None:
    damaged = folder_of(checkpoints, 20)
    found = problem_with(damaged)
    assert found is not None
    with caplog.at_level(logging.WARNING):
        assert find_newest(checkpoints) == folder_of(checkpoints, 10)
    (record,) = caplog.records
    assert record.getMessage() == f"checkpoint {damaged} is damaged ({found}): using the one before it"
    assert "\n" not in record.getMessage()
    with pytest.raises(ValueError, match="cannot be used: ") as error:
        load_checkpoint(damaged)
    assert str(damaged) in str(error.value) and found in str(error.value)
    with pytest.raises(ValueError, match="cannot be used: "):
        load_weights(damaged)
    assert re.search(problem, found), found


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10, 20)
    spoil, problem = DAMAGES[damage]
    spoil(folder_of(tmp_path, 20) / name)
    assert_the_one_before_is_used(tmp_path, problem.format(name=name), caplog)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_damaged_manifest_counts_as_damage(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10, 20)
    content, problem = MANIFESTS[kind]
    path = folder_of(tmp_path, 20) / MANIFEST
    path.unlink() if content is None else path.write_text(content)
    assert_the_one_before_is_used(tmp_path, problem, caplog)


def test_half_written_folders_are_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    shutil.copytree(folder_of(tmp_path, 10), tmp_path / ".tmp_step_00000020")
    (tmp_path / "step_00000030").write_text("a file")
    (tmp_path / "step_x").mkdir()
    assert saved_steps(tmp_path) == [10] and find_newest(tmp_path) == folder_of(tmp_path, 10)
    assert not caplog.records


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "missing") is None
    save(tmp_path, 10)
    (folder_of(tmp_path, 10) / "optimizer.pt").unlink()
    assert find_newest(tmp_path) is None


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_nothing_pickled_is_executed(tmp_path: Path, writer: str) -> None:
    save(tmp_path, 10)
    folder, mark = folder_of(tmp_path, 10), tmp_path / "executed"
    path = folder / "optimizer.pt"
    if writer == "torch":
        torch.save({"optimizer": Malice(mark), "scaler": {}}, path)
    else:
        path.write_bytes(pickle.dumps(Malice(mark), protocol=2))
    replaced = tmp_path / "other"
    shutil.copytree(folder, replaced)
    # An attacker writes a manifest that fits.
    manifest = json.loads((folder / MANIFEST).read_text())
    content = path.read_bytes()
    manifest["optimizer.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert problem_with(folder) is None and problem_with(replaced) is not None
    with pytest.raises(ValueError, match="cannot be used: optimizer.pt holds more than tensors") as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value) and not mark.exists()
    with pytest.raises(ValueError, match="is a pickle, which could run programs"):
        load_weights(path)
    assert not mark.exists()


# ---- weights


def test_weights_of_a_folder_are_their_average_where_there_is_one(tmp_path: Path) -> None:
    save(tmp_path, 10)
    assert torch.equal(load_weights(tmp_path / "last")["weight"], torch.full((50,), -10.0))
    state = some_state(20)
    state.ema = {}
    save_checkpoint(tmp_path, 20, state, "")
    assert torch.equal(load_weights(tmp_path / "last")["weight"], torch.full((50,), 20.0))
    save_file({"w": torch.ones(2)}, tmp_path / "some.safetensors")
    assert torch.equal(load_weights(tmp_path / "some.safetensors")["w"], torch.ones(2))


def test_missing_or_unreadable_weights_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no.safetensors does not exist$"):
        load_weights(tmp_path / "no.safetensors")
    (tmp_path / "text.safetensors").write_text("this is not a network " * 20)
    with pytest.raises(ValueError, match="text.safetensors cannot be read: ") as error:
        load_weights(tmp_path / "text.safetensors")
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused_with_what_does_not_fit(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = network(1).state_dict()
    del weights["1.bias"], weights["0.bias"]
    with pytest.raises(ValueError, match="^here holds another network: weights 2 missing, for example 0.bias$"):
        put_weights(model, weights, "here")
    with pytest.raises(ValueError, match="^here holds another network: weights 1 unknown, for example head$"):
        put_weights(model, {**network(1).state_dict(), "head": torch.ones(1)}, "here")
    with pytest.raises(ValueError, match="weights 7 of another shape, for example 0.bias$"):
        put_weights(model, network(1, width=5).state_dict(), "here")
    assert_same(model.state_dict(), before)
    put_weights(model, network(1).state_dict(), "here")
    assert_same(model.state_dict(), network(1).state_dict())
    run = run_in(tmp_path)
    save(run.checkpoints, 10)
    with pytest.raises(ValueError, match="step_00000010 holds another network: weights 9 missing"):
        Parts(run, accelerator).restore()


# ---- what is kept


def test_links_lead_to_the_last_and_the_best(tmp_path: Path, accelerator: Accelerator) -> None:
    run = run_in(tmp_path)
    parts = Parts(run, accelerator)
    for step, is_best in ((10, True), (20, False), (30, False), (40, False)):
        parts.checkpointer.save(Progress(step=step), is_best=is_best)
    parts.checkpointer.wait(must_succeed=True)
    assert os.readlink(run.checkpoints / "last") == "step_00000040"
    assert os.readlink(run.checkpoints / "best") == "step_00000010"
    assert saved_steps(run.checkpoints) == [10, 30, 40]  # keep_last=2, and the best
    assert names_in(run.checkpoints) == {"best", "best_copy", "last", *(f"step_000000{step}" for step in (10, 30, 40))}
    assert run.has_checkpoint and find_newest(run.checkpoints) == folder_of(run.checkpoints, 40)


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_pruning_keeps_the_newest(tmp_path: Path, keep_last: int) -> None:
    save(tmp_path, 9, 10, 20, 100, 1000)
    prune(tmp_path, CheckpointConfig(keep_last=keep_last))
    assert saved_steps(tmp_path) == [9, 10, 20, 100, 1000][-keep_last:]
    assert all(problem_with(folder_of(tmp_path, step)) is None for step in saved_steps(tmp_path))


def test_every_nth_checkpoint_is_kept_for_good(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, 25, 30)
    prune(tmp_path, CheckpointConfig(keep_last=1, keep_every_steps=10))
    assert saved_steps(tmp_path) == [10, 20, 30]
    save(tmp_path, 35)
    prune(tmp_path, CheckpointConfig(keep_last=2, keep_every_steps=20))
    assert saved_steps(tmp_path) == [20, 30, 35]


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_in(tmp_path)
    parts = Parts(run, accelerator)
    parts.checkpointer.save(Progress(step=10), is_best=True)
    with torch.no_grad():
        next(parts.model.parameters()).view(-1)[0] = torch.inf
    parts.checkpointer.save(Progress(step=20), is_best=True)
    parts.checkpointer.wait()
    assert "of step 20" in caplog.text and "is not finite" in caplog.text
    parts.checkpointer.save(Progress(step=30), is_best=False)
    with pytest.raises(ValueError, match=r"cannot save a checkpoint of step 30: \S+ is not finite"):
        parts.checkpointer.wait(must_succeed=True)
    assert saved_steps(run.checkpoints) == [10] and os.readlink(run.checkpoints / "best") == "step_00000010"


def test_a_damaged_later_checkpoint_never_costs_a_whole_one(tmp_path: Path) -> None:
    """After damage to step 30 training goes on from 20: the new 25 is what must be kept."""
    save(tmp_path, 10, 20, 30)
    (folder_of(tmp_path, 30) / "model.safetensors").unlink()
    save(tmp_path, 25)
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert saved_steps(tmp_path) == [25] and (tmp_path / "last").exists()
    assert find_newest(tmp_path) == folder_of(tmp_path, 25)


def test_pruning_removes_what_a_kill_left_behind(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    for stray in (".tmp_step_00000010", ".tmp_step_00000030"):
        (tmp_path / stray).mkdir()
        (tmp_path / stray / "model.safetensors").write_text("half")
    (tmp_path / ".tmp_best").symlink_to("step_00000010")
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert names_in(tmp_path) == {"last", "step_00000020"}
    prune(tmp_path / "missing", CheckpointConfig(keep_last=1))  # nothing there, nothing to do


# ---- a disk that is full, or cannot be written


def fill(disk: Path, spare_kib: int) -> Path:
    """Occupies the disk up to so many KiB."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - spare_kib * 1024))
    return filler


@pytest.mark.parametrize("spare_kib", [0, 4, 60, 130, 200, 240, 300, 304, 308])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small_disk: Path, spare_kib: int) -> None:
    """Files of 100 KB each, so that every one of them is the first that does not fit."""
    checkpoints = small_disk / "checkpoints"
    save_checkpoint(checkpoints, 10, some_state(10, 25_000), "a: 1\n")
    filler = fill(small_disk, spare_kib)
    before = sizes_in(checkpoints)
    with pytest.raises(ValueError) as error:
        save_checkpoint(checkpoints, 20, some_state(20, 25_000), "a: 1\n")
    assert str(error.value) == f"cannot save a checkpoint in {checkpoints}: the disk is full"
    assert sizes_in(checkpoints) == before and names_in(checkpoints) == {"step_00000010", "last"}
    assert find_newest(checkpoints) == folder_of(checkpoints, 10)
    filler.unlink()
    save_checkpoint(checkpoints, 20, some_state(20, 25_000), "a: 1\n")
    assert find_newest(checkpoints) == folder_of(checkpoints, 20)


def test_training_goes_on_after_a_failed_save(
    small_disk: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_in(small_disk)
    parts = Parts(run, accelerator)
    parts.checkpointer.save(Progress(step=1), is_best=True)
    parts.checkpointer.wait(must_succeed=True)
    filler = fill(small_disk, 4)
    parts.checkpointer.save(Progress(step=2), is_best=True)
    with caplog.at_level(logging.WARNING):
        parts.checkpointer.save(Progress(step=3), is_best=True)
    (record,) = caplog.records
    assert record.getMessage().endswith("the disk is full; training goes on without this checkpoint")
    with pytest.raises(ValueError, match="the disk is full$"):
        parts.checkpointer.wait(must_succeed=True)
    assert saved_steps(run.checkpoints) == [1]
    filler.unlink()
    parts.checkpointer.save(Progress(step=4), is_best=True)
    parts.checkpointer.wait(must_succeed=True)
    assert find_newest(run.checkpoints) == folder_of(run.checkpoints, 4)


def test_a_disk_that_turns_read_only_is_one_line(small_disk: Path, accelerator: Accelerator) -> None:
    run = run_in(small_disk)
    parts = Parts(run, accelerator)
    parts.checkpointer.save(Progress(step=1), is_best=True)
    parts.checkpointer.wait(must_succeed=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    parts.checkpointer.save(Progress(step=2), is_best=True)
    with pytest.raises(ValueError, match="^cannot save a checkpoint in .*Read-only file system") as error:
        parts.checkpointer.wait(must_succeed=True)
    assert "\n" not in str(error.value)
    assert find_newest(run.checkpoints) == folder_of(run.checkpoints, 1)


def test_a_file_in_the_folders_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(ValueError, match="^cannot save a checkpoint in ") as error:
        save(tmp_path / "checkpoints", 10)
    assert "\n" not in str(error.value) and (tmp_path / "checkpoints").read_text() == "mine"


def test_trouble_with_links_and_old_checkpoints_is_a_warning_too(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")  # as file systems that know no links say

    parts = Parts(run_in(tmp_path), accelerator)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    parts.checkpointer.save(Progress(step=1), is_best=True)
    with caplog.at_level(logging.WARNING):
        parts.checkpointer.wait()
    assert "training goes on without this checkpoint" in caplog.text


# ---- kills


def save_for_ever(checkpoints: Path) -> None:
    steps = saved_steps(checkpoints)
    step = steps[-1] if steps else 0
    while True:
        step += 1
        folder = save_checkpoint(checkpoints, step, some_state(step, 40_000), "a: 1\n")
        if step % 3 == 0:
            point(checkpoints, "best", folder)
        prune(checkpoints, CheckpointConfig(keep_last=2))


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    moments, newest, interrupted = random.Random(0), 0, 0
    processes = multiprocessing.get_context("forkserver")  # not fork: this process may have threads by now
    processes.set_forkserver_preload(["lockstep.run.checkpoint"])
    for _ in range(8):
        saver = processes.Process(target=save_for_ever, args=(tmp_path,))
        saver.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and max(saved_steps(tmp_path), default=0) <= newest:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        saver.kill()
        saver.join()
        steps = saved_steps(tmp_path)
        assert steps and steps[-1] > newest, "the saver saved nothing"
        newest = steps[-1]
        for step in steps:
            assert problem_with(folder_of(tmp_path, step)) is None
            assert load_checkpoint(folder_of(tmp_path, step)).model["weight"][0] == step
        assert problem_with(tmp_path / "last") is None
        assert not (tmp_path / "best").is_symlink() or problem_with(tmp_path / "best") is None
        interrupted += any(name.startswith(".tmp_") for name in names_in(tmp_path))
    assert interrupted, "no kill came during a save: the test shows nothing"
    prune(tmp_path, CheckpointConfig(keep_last=2))
    assert not any(name.startswith(".tmp_") for name in names_in(tmp_path))
    assert len(saved_steps(tmp_path)) <= 3 and newest in saved_steps(tmp_path)  # two and the best
