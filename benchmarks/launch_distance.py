"""How far launches of one training end from each other: draws docs/launch_distance.png, prints the README's table.

    python benchmarks/launch_distance.py               # a quarter of an hour on two cores

Digits, a global batch of 256 in 8 microbatches, SGD 0.05: by a plain Accelerate script, by train.py with
`--runtime.exact=false` (the same samples and random numbers, sums in the order that autograd and gloo choose), and by
train.py. Each is started by `accelerate launch` on the CPU with several numbers of processes.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lockstep.models.weights import load_weights
from lockstep.report.figures import Distances, plot_distances
from lockstep.run.checkpoint import folder_of

ROOT = Path(__file__).resolve().parents[1]
STEPS = range(4, 81, 4)
LR, MICRO_BATCH_SIZE = 0.05, 32
SETTINGS = (
    "--train.batch_size=256",
    f"--train.micro_batch_size={MICRO_BATCH_SIZE}",
    "--train.epochs=100",
    f"--train.max_steps={STEPS[-1]}",
    "--optim.name=sgd",
    f"--optim.lr={LR}",
    "--optim.momentum=0.9",
    "--optim.weight_decay=0",
    "--schedule.name=constant",
    f"--checkpoint.every_steps={STEPS.step}",
    "--checkpoint.every_epochs=100",
    f"--checkpoint.keep_last={len(STEPS)}",
    "--train.validate_every_epochs=100",
    "--runtime.threads=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
)
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
PROGRAMS = {"Lockstep": (1, 2, 3, 4), "Lockstep, exact=false": (1, 2, 4), "plain script": (1, 2, 4)}


def launch_command(processes: int, precision: str, program: str, device: str = "cpu") -> list[str]:
    """`accelerate launch` for a program on this machine's CPU, or on a GPU (`cuda`)."""
    one, several = {"cpu": ("cpu", "cpu_2proc"), "cuda": ("gpu", "ddp_2gpu")}[device]
    config = ROOT / "accelerate_configs" / f"{one if processes == 1 else several}.yaml"
    options = ["--config_file", str(config), "--mixed_precision", precision, "--num_cpu_threads_per_process", "1"]
    if processes > 1:
        options += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, str(ROOT / program)]


def launch(processes: int, precision: str, program: str, *arguments: str) -> None:
    command = launch_command(processes, precision, program)
    subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)


def snapshots(program: str, processes: int, precision: str, place: Path) -> list[Path]:
    """Train, and return the files of weights of each of STEPS."""
    place.mkdir()
    if program == "plain script":
        sizes = ["--batch_size", "256", "--micro_batch_size", str(MICRO_BATCH_SIZE), "--epochs", "16"]
        more = ["--out", str(place / "plain.json"), "--save_every_steps", str(STEPS.step), "--lr", str(LR)]
        launch(processes, precision, "benchmarks/plain_accelerate.py", *sizes, *more)
        return [place / f"{step}.safetensors" for step in STEPS]
    exact = str("exact" not in program).lower()
    arguments = [*SETTINGS, f"--runtime.exact={exact}", f"--run.root={place}", "--run.name=run"]
    launch(processes, precision, "train.py", *arguments)
    return [folder_of(place / "run" / "checkpoints", step) / "model.safetensors" for step in STEPS]


def distance(a: Path, b: Path) -> float:
    """The norm of the difference of all weights, relative to that of `a`'s."""
    first, second = (_vector(path) for path in (a, b))
    return float((first - second).norm() / first.norm())


def _vector(path: Path) -> Tensor:
    weights = load_weights(path)
    return torch.cat([weights[name].double().flatten() for name in sorted(weights) if "num_batches" not in name])


def main() -> None:
    panels: dict[str, Distances] = {}
    rows: dict[tuple[str, int], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, precision in PRECISIONS.items():
            panels[title] = {program: {} for program in PROGRAMS}
            for program, launches in PROGRAMS.items():
                files = {
                    processes: snapshots(program, processes, precision, Path(folder, f"{title} {program} {processes}"))
                    for processes in launches
                }
                for processes in launches:
                    digest = hashlib.sha256(files[processes][-1].read_bytes()).hexdigest()
                    rows.setdefault((program, processes), []).append(f"`{digest[:12]}`")
                for processes in launches[1:]:
                    apart = [distance(a, b) for a, b in zip(files[1], files[processes], strict=True)]
                    panels[title][program][f"{processes} processes"] = apart
                    print(f"{title}, {program}, {processes} processes: {apart[-1]:.2g} at the end", flush=True)
    print(f"| program | processes | {' | '.join(PRECISIONS)} |\n|---|---|{'---|' * len(PRECISIONS)}")
    for (program, processes), digests in rows.items():
        print(f"| {program} | {processes} | {' | '.join(digests)} |")
    plot_distances(panels, STEPS, ROOT / "docs" / "launch_distance.png")


if __name__ == "__main__":
    main()
