"""How much of a step of train.py is network, loss and update alone: its loop beside the bare step, in turn.

    python benchmarks/step_share.py
    python benchmarks/step_share.py --models tiny_cnn --batch_size 64
    python benchmarks/step_share.py --precision no    # for a CPU without AVX512-BF16 or AMX

Both are the same network and optimizer in one process, in bf16 where not said otherwise, on random images of 28x28
(grey) or 32x32. The loop has everything on: random crops and flips, label smoothing, clipping, an average of the
weights, the sums that are logged. The bare step is forward, the same loss, backward and fused update on one batch that
stays. Medians over stretches; the share is the median over pairs of them. docs/performance.md has some.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pieces.measured import bare_step
from stretch import prepared, stretch

from lockstep.launch.machine import cpu_model

SHAPES = {"tiny_cnn": "28x28x1", "simple_cnn": "28x28x1", "fashion_cnn": "28x28x1"}
SETTINGS = (
    "--augment.crop_padding=4",
    "--augment.flip=true",
    "--augment.rotation=0",
    "--augment.zoom=0",
    "--optim.name=adamw",
    "--optim.lr=0.001",
    "--optim.clip_norm=1",
    "--train.ema_decay=0.999",
    "--train.label_smoothing=0.1",
)


def _milliseconds(run: Callable[[int], Any], steps: int) -> float:
    begun = time.perf_counter()
    run(steps)
    return 1e3 * (time.perf_counter() - begun) / steps


def measure(model: str, options: argparse.Namespace) -> str:
    """A row of the table: the loop's step and the bare one in milliseconds, and the share, with its range."""
    batch_size, precision = options.batch_size, f"--runtime.precision={options.precision}"
    source = f"synthetic:{SHAPES.get(model, '32x32x3')}x{20 * batch_size}"
    sizes = (f"--train.batch_size={batch_size}", f"--train.micro_batch_size={batch_size}")
    with prepared(f"--model.name={model}", f"--data.source={source}", *sizes, precision, *SETTINGS) as training:
        bare = bare_step(training, batch_size)

        def loop(count: int) -> None:
            stretch(training, count)

        loop(5), bare(5)
        ours, others = [], []
        for pair in range(options.pairs):
            for run, times in ((loop, ours), (bare, others))[:: 1 if pair % 2 else -1]:
                times.append(_milliseconds(run, options.steps))
    shares = sorted(bare_time / own_time for bare_time, own_time in zip(others, ours, strict=True))
    times = f"{statistics.median(ours):.1f} ms | {statistics.median(others):.1f} ms"
    return f"| {model} | {times} | {statistics.median(shares):.3f} | {shares[0]:.2f} to {shares[-1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny_cnn", "simple_cnn", "fashion_cnn", "cifar10_cnn"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument(
        "--steps", type=int, default=64, help="of a stretch: each begins with 4 ms for the order of so many"
    )
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    machine = f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, {'fp32' if options.precision == 'no' else 'bf16'}, batches of {options.batch_size}")
    print("| network | step of train.py | bare step | share | from, to |\n|---|---|---|---|---|")
    for model in options.models:
        print(measure(model, options), flush=True)


if __name__ == "__main__":
    main()
