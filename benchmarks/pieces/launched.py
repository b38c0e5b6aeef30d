"""Pieces that start programs as a user would, and look at what they leave."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from launch_distance import ROOT, SETTINGS, launch_command

from lockstep.run.history import compare_histories, read_history
from pieces.place import Place, Skipped

_QUIET = ("--log.wandb=disabled", "--log.tensorboard=false", "--log.figures=false")


def gpu_tests(place: Place) -> dict[str, Any]:
    """The tests marked `gpu` that are not slow; without a GPU they skip themselves."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "--tb=short", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "outcome": lines[-1] if lines else done.stderr[-300:], "failures": failures}


def _start(place: Place, name: str, *settings: str, processes: int = 1, precision: str = "no") -> subprocess.Popen[str]:
    """A training whose run folder has this name; with several processes, which share the GPU, by gloo."""
    folders = [f"--run.root={place.scratch}", f"--run.name={name}", f"--data.cache_dir={place.scratch / 'cache'}"]
    backend = ["--runtime.backend=gloo"] if processes > 1 else []
    command = launch_command(processes, precision, "train.py", place.device)
    return subprocess.Popen(
        [*command, *_QUIET, *folders, *backend, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _train(place: Place, name: str, *settings: str, processes: int = 1, precision: str = "no") -> Path:
    """Its run folder, when it is done; raises RuntimeError with its last lines if it fails."""
    process = _start(place, name, *settings, processes=processes, precision=precision)
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError("\n".join(printed.splitlines()[-12:]))
    return place.scratch / name


def _summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


# ---- bits


def _proof(place: Place) -> tuple[str, ...]:
    """A training of 8 microbatches a step, with a digest after each."""
    network = "fashion_cnn" if place.is_rehearsal else "timm/resnet18"
    steps = ["--train.max_steps=8"] if place.is_rehearsal else []
    return (*SETTINGS, f"--model.name={network}", "--log.every_steps=1", *steps)


def bits(place: Place, precision: str) -> dict[str, Any]:
    """One process with 8 microbatches beside 2 and 4 that share the device, and one killed and continued on 2."""
    settings = _proof(place)
    alone = _train(place, f"{precision}-1", *settings, precision=precision)
    found: dict[str, Any] = {"digest": [line["digest"] for line in read_history(alone) if "digest" in line][-1]}
    for processes in (2, 4):
        run = _train(place, f"{precision}-{processes}", *settings, processes=processes, precision=precision)
        found[f"{processes} processes"] = _compare(run, alone)
    found["killed and continued on 2"] = _compare(_kill_and_continue(place, precision, settings), alone)
    return found | {"passed": all(";" not in verdict and "equal" in verdict for verdict in list(found.values())[1:])}


def _compare(run: Path, other: Path) -> str:
    return compare_histories(read_history(run), read_history(other))


def _kill_and_continue(place: Place, precision: str, settings: tuple[str, ...]) -> Path:
    """A run that was killed when it had saved, and goes on with other processes."""
    name = f"{precision}-killed"
    run = place.scratch / name
    shutil.rmtree(run, ignore_errors=True)
    process = _start(place, name, *settings, precision=precision)
    while not (run / "checkpoints" / "last").exists() and process.poll() is None:
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:  # the launcher last
        each.kill()
    process.communicate()
    return _train(place, name, *settings, processes=2, precision=precision)


def fsdp(place: Place) -> dict[str, Any]:
    """Two processes that share weights and optimizer state (FSDP2) beside one alone."""
    settings = (*_proof(place), "--runtime.fsdp=true")
    alone = _train(place, "fsdp-1", *settings, precision="bf16")
    verdict = _compare(_train(place, "fsdp-2", *settings, processes=2, precision="bf16"), alone)
    return {"2 processes": verdict, "passed": "equal" in verdict and ";" not in verdict}


# ---- precision and memory


def fp16(place: Place) -> dict[str, Any]:
    """The quick start in fp16; the scaler begins too high, so a few steps are skipped."""
    if place.is_rehearsal:
        raise Skipped("a CPU cannot train in fp16")
    summary = _summary(_train(place, "fp16", precision="fp16"))
    lines = read_history(place.scratch / "fp16")
    skipped = sum(line.get("bad_steps", 0) for line in lines)
    accuracy = summary["test_accuracy"]
    return {"test_accuracy": accuracy, "skipped_steps": skipped, "passed": accuracy >= 0.97}


def auto(place: Place) -> dict[str, Any]:
    """The microbatch that `micro_batch_size=auto` finds."""
    sizes = ["--train.batch_size=256"]
    if not place.is_rehearsal:
        sizes = ["--train.batch_size=4096", "--model.name=timm/resnet50", "--data.source=synthetic:224x224x3x5000"]
    precision = "no" if place.is_rehearsal else "bf16"
    steps = ("--train.max_steps=1", "--train.micro_batch_size=auto")
    run = _train(place, "auto", *sizes, *steps, precision=precision)
    return {"micro_batch_size": _summary(run)["micro_batch_size"], "passed": True}


def out_of_memory(place: Place) -> dict[str, Any]:
    """A microbatch that no GPU has room for: one line that says what to lower."""
    if place.is_rehearsal:
        raise Skipped("needs a GPU; on a CPU tests/training/test_memory.py does it")
    data = ("--data.source=synthetic:64x64x3x40000", "--model.name=timm/resnet50", "--model.stem=imagenet")
    sizes = ("--train.batch_size=32768", "--train.micro_batch_size=32768")
    process = _start(place, "out_of_memory", *data, *sizes)
    printed, _ = process.communicate()
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    line = lines[0] if lines else "\n".join(printed.splitlines()[-6:])
    return {"line": line, "passed": process.returncode != 0 and "lower --train.micro_batch_size=32768" in line}


# ---- recipes


def recipe(place: Place, name: str, target: float) -> dict[str, Any]:
    """A CIFAR-10 recipe in bf16, to its end; it goes on where an earlier start was stopped."""
    config = ROOT / "configs" / f"{name}.yaml"
    if not config.exists():
        raise Skipped(f"there is no {config.name}")
    if not place.cifar10:
        raise Skipped("no CIFAR-10 here: say where with --cifar10")
    if place.cifar10.startswith("hf:") and importlib.util.find_spec("datasets") is None:
        raise Skipped("hf: needs the package datasets: give a folder:<path>")
    few = ["--train.max_steps=1", "--train.batch_size=64"] if place.is_rehearsal else []
    settings = (f"--config={config}", f"--data.source={place.cifar10}", *few)
    summary = _summary(_train(place, name, *settings, precision="bf16"))
    keys = ("test_accuracy", "train_seconds", "wall_seconds", "images_per_second")
    found = {key: summary.get(key) for key in keys}
    return found | {"passed": place.is_rehearsal or summary["test_accuracy"] >= target}


def last_error(text: str) -> str:
    """The last lines of what a piece printed, without the frames."""
    lines = [line for line in text.strip().splitlines() if not re.match(r"\s*(File |~|\^)", line)]
    return "\n".join(lines[-6:])
