"""Seconds from SIGKILL to the next new step of the same training, and where they go.

    python benchmarks/restart_seconds.py                    # a few minutes on two cores
    python benchmarks/restart_seconds.py --processes 1 2 --repeats 5

A training by `accelerate launch` is killed in a step (one process: all of it; several: one rank, and the launcher ends
the rest), and the same command is given at once, as a scheduler or a shell loop would. Steps that are only repeated,
because they came after the last checkpoint, are no new ones, and are counted as such. Medians over repeats.

Measured on a 2-core AMD EPYC, medians of 3: one process 10.0 s, two 9.1 s (docs/survival.md has the parts).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "--model.name=cifar10_cnn",
    "--data.source=synthetic:32x32x3x10000",
    "--train.batch_size=128",
    "--train.micro_batch_size=32",
    "--train.epochs=100",
    "--train.validate_every_epochs=100",
    "--checkpoint.every_steps=20",
    "--log.every_steps=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
    "--run.name=restart",
)
# Becomes train.py, and notes when which part of it is done.
MARKER = """
import json, os, runpy, sys, time

place = sys.argv.pop(1)


def mark(name):
    if os.environ.get("RANK", "0") == "0":
        with open(place, "a") as file:
            print(json.dumps([name, time.time()]), file=file)


def noted(module, name, mark_of, before=False):
    function = getattr(module, name)

    def call(*arguments, **named):
        if before:
            mark(mark_of)
        result = function(*arguments, **named)
        if not before:
            mark(mark_of)
        return result

    setattr(module, name, call)


mark("started")
from lockstep.data import images
from lockstep.launch import accelerator
from lockstep.run import checkpoint
from lockstep.training import optim

noted(accelerator, "build_accelerator", "imported", before=True)
noted(accelerator, "build_accelerator", "connected")
noted(images, "build_data", "data")
noted(checkpoint.Checkpointer, "restore", "restored")
noted(optim, "update", "step")
sys.argv[0] = os.path.join(os.environ["LOCKSTEP_ROOT"], "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PARTS = {
    "detect": ("killed", "ended"),
    "launch": ("ended", "started"),
    "imports": ("started", "imported"),
    "connect": ("imported", "connected"),
    "data": ("connected", "data"),
    "network and checkpoint": ("data", "restored"),
    "first step": ("restored", "step"),
    "repeated steps": ("step", "new step"),
}


def start(place: Path, processes: int) -> subprocess.Popen[bytes]:
    """The training, by `accelerate launch` on CPUs."""
    program, marks = place / "marker.py", place / "marks"
    program.write_text(MARKER)
    marks.write_text("")
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    options = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(program), str(marks), *SETTINGS]
    command += [f"--data.cache_dir={place / 'cache'}"]
    with (place / "output.txt").open("ab") as output:
        environment = {**os.environ, "LOCKSTEP_ROOT": str(ROOT)}
        return subprocess.Popen(
            command, cwd=place, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def last_step(place: Path) -> int:
    """The last step that is in the log."""
    log = place / "runs" / "restart" / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for_step(place: Path, step: int) -> float:
    """When it was seen in the log."""
    while last_step(place) < step:
        time.sleep(0.01)
    return time.time()


def kill(training: subprocess.Popen[bytes], processes: int) -> tuple[float, float]:
    """When it was killed, and when all of it had ended."""
    ranks = [
        child for child in psutil.Process(training.pid).children(recursive=True) if "marker.py" in str(child.cmdline())
    ]
    killed = time.time()
    if processes == 1:
        os.killpg(training.pid, signal.SIGKILL)
    else:
        ranks[-1].send_signal(signal.SIGKILL)
    training.wait()
    psutil.wait_procs(ranks)
    return killed, time.time()


def restart(place: Path, processes: int) -> tuple[dict[str, float], int]:
    """The parts of one restart, in seconds, and how many steps were repeated."""
    training = start(place, processes)
    wait_for_step(place, last_step(place) + 50)
    killed, ended = kill(training, processes)
    reached = last_step(place)
    training = start(place, processes)
    moments = {"killed": killed, "ended": ended, "new step": wait_for_step(place, reached + 1)}
    for name, moment in map(json.loads, (place / "marks").read_text().splitlines()):
        moments.setdefault(name, moment)
    left = psutil.Process(training.pid).children(recursive=True)
    for process in (training, *left):
        process.kill()
    training.wait()
    psutil.wait_procs(left)
    return {part: moments[end] - moments[begin] for part, (begin, end) in PARTS.items()}, reached % 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder).resolve()
            (place / "runs").mkdir()
            results = [restart(place, processes) for _ in range(options.repeats)]
        parts = {part: statistics.median(times[part] for times, _ in results) for part in PARTS}
        repeated = statistics.median(steps for _, steps in results)
        print(f"{processes} process{'es' * (processes > 1)}: {sum(parts.values()):.1f} s in all; ", end="")
        print(
            ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items()), f"({repeated:.0f} steps)", flush=True
        )


if __name__ == "__main__":
    main()
