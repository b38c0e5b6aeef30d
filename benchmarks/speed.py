"""How fast train.py is beside a plain Accelerate script of the same work: both as programs, in turn.

    python benchmarks/speed.py                              # nine minutes on two cores
    python benchmarks/speed.py --model fashion_cnn

Both are started by `accelerate launch` with the same precision and train the same network on random 32x32 images with
random crops and flips, batches of 256. Images per second of training, without the first epoch; medians over rounds.
On a GPU train.py multiplies fp32 matrices in TF32, which the plain script does not.

Measured with cifar10_cnn on a 2-core AMD EPYC (AVX512-BF16), train.py / plain script: with the one thread that the
launcher gives by default and two data workers 3.7 (fp32) and 2.8 (bf16), without workers 4.0 and 3.6; with two threads
2.4 and 2.6, without workers 2.2 and 2.6.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE, EPOCHS = 256, 3
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
    "--checkpoint.every_steps=1000000",
    "--log.every_steps=1000000",  # a line per epoch, as the plain script times them
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
)


def launch(precision: str, threads: int, program: str, *arguments: str) -> None:
    """Start a program by Accelerate's launcher, on one GPU or with so many CPU threads."""
    options = ["--quiet", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    options += ["--mixed_precision", precision, "--num_cpu_threads_per_process", str(threads)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(ROOT / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-3000:]}")


def plain_speed(place: Path, source: str, model: str, precision: str, threads: int, workers: int) -> float:
    out = place / "plain.json"
    sizes = ["--batch_size", str(BATCH_SIZE), "--micro_batch_size", str(BATCH_SIZE), "--epochs", str(EPOCHS)]
    choices = ["--source", source, "--model", model, "--workers", str(workers), "--out", str(out)]
    launch(precision, threads, "benchmarks/plain_accelerate.py", *sizes, *choices)
    return statistics.median(json.loads(out.read_text())["images_per_second"][1:])


def our_speed(place: Path, source: str, model: str, precision: str) -> float:
    run = Path(tempfile.mkdtemp(dir=place))
    choices = [f"--data.source={source}", f"--model.name={model}", f"--run.root={run}", "--run.name=run"]
    launch(precision, 1, "train.py", *choices, f"--data.cache_dir={place / 'cache'}", *SETTINGS)
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[1:] if line["split"] == "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10_cnn", help="a name as --model.name takes it")
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--precision", nargs="+", default=["no", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source = f"synthetic:32x32x3x{options.images}"
    cores = torch.get_num_threads()
    for precision in options.precision:
        plain: dict[str, list[float]] = {}
        ours = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                for threads in sorted({1, cores}):
                    for workers in (0, 2):
                        name = f"{threads} threads, {workers} workers"
                        speed = plain_speed(place, source, options.model, precision, threads, workers)
                        plain.setdefault(name, []).append(speed)
                ours.append(our_speed(place, source, options.model, precision))
        speed = statistics.median(ours)
        print(f"{options.model}, precision {precision}: train.py {speed:,.0f} images/s")
        for name, speeds in plain.items():
            other = statistics.median(speeds)
            print(f"  plain script, {name}: {other:,.0f} images/s; train.py is {speed / other:.2f} times as fast")


if __name__ == "__main__":
    main()
