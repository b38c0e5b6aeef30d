"""Stopping on request: real signals to real processes, a stop file, a time limit; nothing is lost and all ranks end."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from fork_server import ForkServer
from programs import QUICK, ROOT, finish, free_port, launch_command, ranks_of, read_lines, start, wait_for_step
from runs import differences

from lockstep.errors import UserError
from lockstep.launch.accelerator import Launch
from lockstep.launch.preemption import REQUEUE_CODE, Preemption
from lockstep.models.weights import load_weights
from lockstep.run.checkpoint import saved_steps
from lockstep.settings.config import RunConfig

ALONE = Launch(torch.device("cpu"), 1, 0, 0, "no", 1)

# Long enough to be caught in the middle.
LONG = (
    *QUICK,
    "--model.name=tiny_cnn",
    "--train.epochs=60",
    "--checkpoint.every_epochs=30",
    "--train.validate_every_epochs=30",
    "--optim.name=sgd",
    "--optim.lr=0.01",
    "--schedule.name=constant",
    "--log.every_steps=1",
    "--runtime.threads=1",  # two threads of a small network wait for each other when the machine is busy
)


@pytest.fixture
def own_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_signals_ask(number: signal.Signals, tmp_path: Path, own_signals: None) -> None:
    preemption = Preemption(RunConfig(), tmp_path, ALONE)
    assert not preemption.agreed()
    os.kill(os.getpid(), number)
    assert preemption.agreed() and number.name in str(preemption.reason)
    assert preemption.leave(7) == REQUEUE_CODE == 85
    assert json.loads((tmp_path / "preempted").read_text())["step"] == 7


def test_ctrl_c_pressed_again_ends_at_once_and_one_that_a_launcher_passes_on_does_not(
    tmp_path: Path, own_signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    preemption = Preemption(RunConfig(), tmp_path, ALONE)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    assert preemption.agreed()
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 4)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_while_images_are_decoded_ends_at_once(tmp_path: Path, own_signals: None) -> None:
    preemption = Preemption(RunConfig(), tmp_path, ALONE)
    with pytest.raises(SystemExit) as end, preemption.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == REQUEUE_CODE
    assert json.loads((tmp_path / "preempted").read_text()) == {"step": 0, "reason": "signal SIGTERM"}
    other = Preemption(RunConfig(), tmp_path, replace(ALONE, process_index=1))
    with other.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert other.wanted(), "a process that waits for the one that decodes goes on waiting, and asks later"


def test_a_stop_file_that_is_none_is_one_line(tmp_path: Path, own_signals: None) -> None:
    (tmp_path / "stop").mkdir()
    with pytest.raises(UserError, match="stop is a folder: remove it"):
        Preemption(RunConfig(), tmp_path, ALONE)


def test_stop_file_asks_once(tmp_path: Path, own_signals: None) -> None:
    (tmp_path / "stop").touch()
    preemption = Preemption(RunConfig(), tmp_path, ALONE)
    assert not (tmp_path / "stop").exists() and not preemption.agreed()
    (tmp_path / "stop").touch()
    time.sleep(1.1)
    assert preemption.agreed() and "stop" in str(preemption.reason)


def test_time_limit_asks(tmp_path: Path, own_signals: None) -> None:
    preemption = Preemption(RunConfig(max_hours=1e-6), tmp_path, ALONE)
    time.sleep(0.05)
    assert preemption.agreed() and "max_hours" in str(preemption.reason)
    assert not Preemption(RunConfig(max_hours=1.0), tmp_path, ALONE).agreed()


def test_only_the_main_process_looks_at_the_file(tmp_path: Path, own_signals: None) -> None:
    preemption = Preemption(RunConfig(), tmp_path, replace(ALONE, process_index=1))
    (tmp_path / "stop").touch()
    assert not preemption.wanted()


@pytest.fixture
def group() -> Iterator[Any]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(("step_seconds", "most_questions", "most_steps"), [(0.001, 15, 16), (0.3, 10, 1)])
def test_short_steps_ask_seldom_and_long_ones_at_once(
    step_seconds: float,
    most_questions: int,
    most_steps: int,
    tmp_path: Path,
    own_signals: None,
    group: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *given, **more: questions.append(1) or all_reduce(*given, **more))
    preemption = Preemption(RunConfig(), tmp_path, replace(ALONE, num_processes=2, host_group=group))

    def steps_until_agreed(limit: int) -> int:
        for steps in range(limit):
            time.sleep(step_seconds)
            if preemption.agreed():
                return steps
        return limit

    calls = 150 if step_seconds < 0.1 else 10
    assert steps_until_agreed(calls) == calls
    assert 8 <= len(questions) <= most_questions
    os.kill(os.getpid(), signal.SIGUSR2)
    assert steps_until_agreed(100) <= most_steps


def test_a_question_that_waits_is_answered_as_of_now(tmp_path: Path, own_signals: None, group: Any) -> None:
    preemption = Preemption(RunConfig(), tmp_path, replace(ALONE, num_processes=2, host_group=group))
    for _ in range(5):
        assert not preemption.agreed() and not preemption.agreed(wait=True)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert preemption.agreed(wait=True)


def assert_gone(processes: list[psutil.Process], seconds: float = 30) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    left = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"still running: {left}"


@pytest.mark.slow
@pytest.mark.launch
def test_one_rank_is_asked_and_all_stop_then_one_process_or_four_go_on(server: ForkServer, tmp_path: Path) -> None:
    settings = (*LONG, "--train.max_steps=90", f"--data.cache_dir={tmp_path / 'cache'}")
    server.run(1, tmp_path, *settings, "--run.name=whole")
    pair = start([*launch_command(2, "train.py"), *settings, "--run.name=moved"], tmp_path)
    run = tmp_path / "runs" / "moved"
    wait_for_step(run, 30, pair)
    ranks = ranks_of(pair)
    assert len(ranks) == 2, "a test that does not see two ranks proves nothing"
    ranks[1].send_signal(signal.SIGUSR2)
    done = finish(pair, 60)
    assert done.returncode != 0  # torchrun turns 85 into 1: hence the file
    assert_gone(ranks)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "preempted" and 30 <= summary["steps"] < 90
    assert (run / "preempted").exists() and "the same command continues" in done.stdout + done.stderr

    shutil.copytree(tmp_path / "runs", tmp_path / "copies", symlinks=True)
    for root, processes in (("runs", 1), ("copies", 4)):
        place = (f"--run.root={root}", "--run.name=moved")
        server.run(processes, tmp_path, *settings, *place)
        run = tmp_path / root / "moved"
        assert [entry["processes"] for entry in json.loads((run / "environment.json").read_text())] == [2, processes]
        assert not (run / "preempted").exists()
        found = differences(run, tmp_path / "runs" / "whole")
        assert [line for line in found if not line.startswith("stray checkpoints/step_")] == []  # that of the stop


@pytest.mark.slow
@pytest.mark.launch
def test_a_stopped_run_goes_on_in_another_precision(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *QUICK, "--run.name=x", f"--data.cache_dir={tmp_path}"]
    codes = [
        finish(start([*command, *more], tmp_path, ACCELERATE_MIXED_PRECISION=precision), 60).returncode
        for precision, more in (("no", ["--run.max_hours=1e-9"]), ("bf16", []))
    ]
    run = tmp_path / "runs" / "x"
    assert codes == [REQUEUE_CODE, 0]
    assert [begun["precision"] for begun in json.loads((run / "environment.json").read_text())] == ["no", "bf16"]
    steps = [line["step"] for line in read_lines(run) if line["split"] == "train"]
    assert steps == sorted(set(steps)) and json.loads((run / "summary.json").read_text())["state"] == "finished"
    assert {value.dtype for value in load_weights(run / "checkpoints" / "last").values()} >= {torch.float32}


@pytest.mark.launch
def test_signal_to_every_process_of_the_job_exits_with_the_requeue_code(tmp_path: Path) -> None:
    """As schedulers send it: also to the workers that decode images, which must outlive it."""
    streamed = ("--data.memory_budget=0", "--data.workers=2", "--run.name=x", f"--data.cache_dir={tmp_path}")
    process = start([sys.executable, str(ROOT / "train.py"), *LONG, *streamed], tmp_path)
    wait_for_step(tmp_path / "runs" / "x", 10, process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(everyone) >= 3, "a test that does not see workers proves nothing"
    os.killpg(process.pid, signal.SIGTERM)
    assert finish(process, 60).returncode == REQUEUE_CODE
    assert_gone(everyone)


@pytest.mark.slow
@pytest.mark.launch
def test_launcher_that_dies_while_its_ranks_start_takes_them_with_it(tmp_path: Path) -> None:
    """They would look for it, to meet each other there, for minutes."""
    process = start([*launch_command(2, "train.py"), *LONG, "--run.name=x"], tmp_path)
    deadline = time.monotonic() + 60
    while len(ranks := ranks_of(process)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    finish(process, 60)
    assert_gone(ranks)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_launcher_that_dies_leaves_a_saved_run_and_no_orphan(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM to a launcher of one process is not passed on: the training would go on alone, unseen."""
    process = start([*launch_command(1, "train.py"), *LONG, "--run.name=x", f"--data.cache_dir={tmp_path}"], tmp_path)
    run = tmp_path / "runs" / "x"
    wait_for_step(run, 10, process)
    ranks = ranks_of(process)
    assert len(ranks) == 1
    process.send_signal(number)
    finish(process, 60)
    assert_gone(ranks)
    assert json.loads((run / "summary.json").read_text())["state"] == "preempted"


@pytest.mark.launch
def test_signals_after_the_end_change_nothing(tmp_path: Path) -> None:
    """A scheduler's signal for a job that has just finished must not make it a failed one."""
    process = start([sys.executable, str(ROOT / "train.py"), *QUICK, "--run.name=done"], tmp_path)
    summary = tmp_path / "runs" / "done" / "summary.json"
    while not summary.exists() or json.loads(summary.read_text()).get("state") != "finished":
        assert process.poll() is None
        time.sleep(0.005)
    while process.poll() is None:
        for number in (signal.SIGUSR2, signal.SIGTERM):
            process.send_signal(number)
        time.sleep(0.001)
    assert process.returncode == 0
    assert not (tmp_path / "runs" / "done" / "preempted").exists()


def torchrun(processes: int) -> list[str]:
    options = ["--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py")]


IGNORING_USR2 = ["bash", "-c", "trap '' USR2; exec \"$@\"", "bash"]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("command", "number", "to_launcher", "to_ranks"),
    [
        pytest.param([sys.executable, str(ROOT / "train.py")], signal.SIGUSR2, True, False, id="python-USR2"),
        pytest.param(launch_command(2, "train.py"), signal.SIGTERM, True, False, id="launch-2-TERM-to-launcher"),
        *(
            pytest.param(*form, id=name, marks=pytest.mark.slow)
            for name, form in {
                "trap-1-USR2": ([*IGNORING_USR2, *launch_command(1, "train.py")], signal.SIGUSR2, True, True),
                "trap-2-USR2": ([*IGNORING_USR2, *launch_command(2, "train.py")], signal.SIGUSR2, True, True),
                "launch-1-USR2-to-rank": (launch_command(1, "train.py"), signal.SIGUSR2, False, True),
                "launch-2-USR2-to-launcher": (launch_command(2, "train.py"), signal.SIGUSR2, True, False),
                "torchrun-2-TERM-to-launcher": (torchrun(2), signal.SIGTERM, True, False),
                "torchrun-2-USR2-to-ranks": (torchrun(2), signal.SIGUSR2, False, True),
            }.items()
        ),
    ],
)
def test_every_launch_form_saves_and_ends(
    command: list[str], number: signal.Signals, to_launcher: bool, to_ranks: bool, tmp_path: Path
) -> None:
    process = start([*command, *LONG, "--run.name=x", f"--data.cache_dir={tmp_path}"], tmp_path)
    run = tmp_path / "runs" / "x"
    wait_for_step(run, 10, process)
    ranks = ranks_of(process)
    plain = command[1] == str(ROOT / "train.py")
    assert len(ranks) == (0 if plain else json.loads((run / "environment.json").read_text())[-1]["processes"])
    for rank in ranks if to_ranks else ():
        rank.send_signal(number)
    if to_launcher:
        process.send_signal(number)
    done = finish(process, 60)
    assert done.returncode == REQUEUE_CODE if plain else done.returncode != 0
    assert_gone(ranks)
    summary, marker = (json.loads((run / name).read_text()) for name in ("summary.json", "preempted"))
    assert summary["state"] == "preempted" and 10 <= summary["steps"] == marker["step"] < 300
    assert saved_steps(run / "checkpoints")[-1] == marker["step"]
    assert done.stdout.count("the same command continues") == 1 and "Traceback" not in done.stdout


@pytest.mark.slow
@pytest.mark.launch
def test_signal_to_every_process_of_the_job_spares_wandb(tmp_path: Path) -> None:
    """Its own process holds the newest records in memory, and is told of the end by the training."""
    home = {name: str(tmp_path / "wandb") for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    settings = (*LONG, "--log.wandb=offline", "--run.name=x", f"--data.cache_dir={tmp_path / 'cache'}")
    process = start([sys.executable, str(ROOT / "train.py"), *settings], tmp_path, **home)
    run = tmp_path / "runs" / "x"
    wait_for_step(run, 10, process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert any("wandb" in child.name() for child in everyone), "a test that does not see W&B's process proves nothing"
    os.killpg(process.pid, signal.SIGUSR2)
    done = finish(process, 60)
    assert done.returncode == REQUEUE_CODE and "W&B stopped" not in done.stdout, done.stdout
    assert_gone(everyone)
    (copy,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"preempted" in copy.read_bytes()
    assert copy.read_bytes().count(b"train/accuracy") >= len(read_lines(run))
