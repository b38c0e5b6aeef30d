"""The same training launched three ways, by a plain Accelerate script and by train.py: draws docs/launch_curves.png.

    python benchmarks/launch_curves.py

Each is started by `accelerate launch` on the CPU with 1, 2 and 4 processes and accumulation 4, 2 and 1, in fp32, with
an optimizer that does not amplify rounding much (docs/sameness.md).
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lockstep.report.figures import plot_launches

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "--train.batch_size=256",
    "--train.micro_batch_size=64",
    "--train.epochs=30",
    "--optim.name=sgd",
    "--optim.lr=0.01",
    "--optim.momentum=0.9",
    "--optim.weight_decay=0",
    "--schedule.name=constant",
    "--checkpoint.every_epochs=10",
    "--train.validate_every_epochs=10",
    "--log.every_steps=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
)


def start(processes: int, port: int, program: str, *arguments: str) -> None:
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    options = ["--config_file", str(config)]
    if processes > 1:
        options += ["--num_processes", str(processes), "--main_process_port", str(port)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options]
    subprocess.run([*launcher, str(ROOT / program), *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    plain: dict[str, list[float]] = {}
    ours: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, processes in enumerate((1, 2, 4)):
            name = f"{processes} x {4 // processes}"
            out = f"{place}/{processes}.json"
            start(processes, 29600 + number, "benchmarks/plain_accelerate.py", "--out", out)
            plain[name] = json.loads(Path(out).read_text())["losses"]
            start(processes, 29610 + number, "train.py", f"--run.root={place}", f"--run.name={processes}", *SETTINGS)
            lines = [json.loads(line) for line in Path(place, str(processes), "metrics.jsonl").read_text().splitlines()]
            ours[name] = [line["loss"] for line in lines if line["split"] == "train"]
    for title, curves in (("plain Accelerate script", plain), ("train.py", ours)):
        first, *others = curves.values()
        apart = [abs(a - b) for other in others for a, b in zip(first, other, strict=False)]
        print(f"{title}: losses of the launches are {statistics.median(apart):.2g} apart, at most {max(apart):.2g}")
    plot_launches({"Plain Accelerate script": plain, "Lockstep": ours}, ROOT / "docs" / "launch_curves.png")


if __name__ == "__main__":
    main()
