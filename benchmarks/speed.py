"""How fast train.py is beside the same training as others would write it, and beside the bare step.

    make bench                                                             # ten minutes on two cores
    python benchmarks/speed.py --cases cifar10_cnn-bf16 --out result.json
    python benchmarks/speed.py --packages DIR                              # where Lightning and transformers lie

In bf16, or in fp32 where the CPU has no instructions for bf16. All are programs, started in turn, each with all cores:
train.py and plain_accelerate.py by `accelerate launch`, those of rivals.py by themselves, which have two data workers
where not said otherwise. They train the same network on random images with random crops and flips, batches of 256.
Images per second of training, without the first epoch: medians over rounds, with the smallest and largest. Lightning
and transformers are left out where they are not installed (`pip install --target DIR lightning transformers`). On a GPU
see gpu.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lockstep.launch.machine import cpu_model, has_fast_bf16

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE, EPOCHS, IMAGES = 256, 3, 2560
SETTINGS = (
    f"--train.batch_size={BATCH_SIZE}",
    f"--train.micro_batch_size={BATCH_SIZE}",
    f"--train.epochs={EPOCHS}",
    "--model.dropout=0.1",
    "--augment.crop_padding=4",
    "--augment.flip=true",
    "--augment.rotation=0",  # the quick start's recipe, which is the default, has some
    "--augment.zoom=0",
    "--train.label_smoothing=0.1",
    "--optim.name=sgd",
    "--optim.lr=0.01",
    "--optim.momentum=0.9",
    "--optim.weight_decay=0",
    "--schedule.name=constant",
    "--checkpoint.every_epochs=1000",
    "--log.every_steps=1000000",  # a line per epoch, as the others time them
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
)
OURS = "train.py"


@dataclass(frozen=True)
class Case:
    """A network and its images, in one precision, and who trains it beside train.py."""

    model: str
    shape: str
    precision: str
    programs: dict[str, str]
    """What it is called in the table -> plain, or a name of rivals.py"""

    @property
    def source(self) -> str:
        return f"synthetic:{self.shape}x{IMAGES}"


_SCRIPTS = {
    "plain Accelerate script": "plain",
    "timm-like script": "timm_like",
    "Lightning": "lightning",
    "Hugging Face Trainer": "hf_trainer",
    "bare step": "bare_step",
}
_FIRST_LOOP = {"a first loop by hand, fp32, no workers": "by_hand", "bare step": "bare_step"}
CASES = {
    "cifar10_cnn-bf16": Case("cifar10_cnn", "32x32x3", "bf16", _SCRIPTS),
    "cifar10_cnn-fp32": Case("cifar10_cnn", "32x32x3", "no", _SCRIPTS),
    "simple_cnn-bf16": Case("simple_cnn", "28x28x1", "bf16", _FIRST_LOOP),
    "simple_cnn-fp32": Case("simple_cnn", "28x28x1", "no", _FIRST_LOOP),
    "fashion_cnn-bf16": Case("fashion_cnn", "28x28x1", "bf16", _FIRST_LOOP),
    "fashion_cnn-fp32": Case("fashion_cnn", "28x28x1", "no", _FIRST_LOOP),
}
_PACKAGES = {"lightning": "lightning", "hf_trainer": "transformers"}


class Bench:
    """Starts programs, and knows where they leave what they measured."""

    def __init__(self, place: Path, packages: str | None) -> None:
        self._place = place
        self._cores = torch.get_num_threads()
        paths = [ROOT / "benchmarks", packages, os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(str(entry) for entry in paths if entry)
        self._environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self._cores)}

    def speed(self, case: Case, program: str) -> float:
        """Images per second: the median of a program's epochs after the first."""
        if program == OURS:
            return self._ours(case)
        out = self._place / "speeds.json"
        arguments = ["--source", case.source, "--model", case.model, "--epochs", str(EPOCHS), "--out", str(out)]
        if program == "plain":
            sizes = [f"--{size}={BATCH_SIZE}" for size in ("batch_size", "micro_batch_size")]
            self._start(
                [*self._launcher(case), str(ROOT / "benchmarks/plain_accelerate.py"), *sizes, "--workers=2"], arguments
            )
        else:
            rival = [sys.executable, str(ROOT / "benchmarks/rivals.py"), program, f"--precision={case.precision}"]
            self._start(rival, arguments)
        return statistics.median(json.loads(out.read_text())["images_per_second"][1:])

    def _ours(self, case: Case) -> float:
        run = Path(tempfile.mkdtemp(dir=self._place), "run")
        places = [f"--run.root={run.parent}", f"--run.name={run.name}", f"--data.cache_dir={self._place / 'cache'}"]
        names = [f"--data.source={case.source}", f"--model.name={case.model}"]
        self._start([*self._launcher(case), str(ROOT / "train.py")], [*names, *places, *SETTINGS])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return statistics.median([line["images_per_second"] for line in lines if line["split"] == "train"][1:])

    def _launcher(self, case: Case) -> list[str]:
        options = ["--quiet", "--num_processes=1", "--num_machines=1", "--dynamo_backend=no"]
        options += [f"--mixed_precision={case.precision}", f"--num_cpu_threads_per_process={self._cores}"]
        return [sys.executable, "-m", "accelerate.commands.launch", *options]

    def _start(self, program: list[str], arguments: list[str]) -> None:
        command = [*program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-3000:]}")


def is_there(program: str, packages: str | None) -> bool:
    """Whether what a program needs is installed, beside the project or in `packages`."""
    name = _PACKAGES.get(program)
    return name is None or find_spec(name) is not None or (packages is not None and Path(packages, name).is_dir())


def usual_cases() -> list[str]:
    """Those in the precision that this CPU is quick in: bf16 without instructions for it took 13 times as long."""
    return [name for name, case in CASES.items() if (case.precision == "bf16") == has_fast_bf16(on_cpu=True)]


def measure(case: Case, rounds: int, packages: str | None) -> dict[str, list[float]]:
    """Images per second of every program in every round, train.py first."""
    programs = {OURS: OURS} | {name: program for name, program in case.programs.items() if is_there(program, packages)}
    speeds: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), packages)
        for _ in range(rounds):
            for name, program in programs.items():
                speeds[name].append(bench.speed(case, program))
    return speeds


def table_of(name: str, speeds: dict[str, list[float]]) -> str:
    """Markdown: each program's speed with its spread, and how many times as fast train.py is, round by round."""
    lines = [f"| {name} | images/s | train.py is | from | to |", "|---|---|---|---|---|"]
    for program, found in speeds.items():
        ratios = sorted(ours / other for ours, other in zip(speeds[OURS], found, strict=True))
        cells = [f"{statistics.median(found):,.0f}", f"{statistics.median(ratios):.2f} times as fast"]
        lines.append(f"| {' | '.join([program, *cells, f'{ratios[0]:.2f}', f'{ratios[-1]:.2f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=usual_cases(), choices=CASES, metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packages", help="a folder that pip installed Lightning and transformers into")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {
        "machine": cpu_model(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "speeds": {},
    }
    print(f"{found['machine']}, {found['cores']} cores, torch {found['torch']}; medians of {options.rounds} rounds")
    for name in options.cases:
        found["speeds"][name] = measure(CASES[name], options.rounds, options.packages)
        print(f"\n{table_of(name, found['speeds'][name])}", flush=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
