"""How much of a step of train.py is network, loss and update alone: its loop and the bare step, step by step in turn.

    python benchmarks/step_share.py
    python benchmarks/step_share.py --models tiny_cnn --batch_size 64
    python benchmarks/step_share.py --precision no    # for a CPU without AVX512-BF16 or AMX

Both are the same network and optimizer in one process, in bf16 where not said otherwise, on random images of 28x28
(grey) or 32x32. The loop has everything on: random crops and flips, label smoothing, clipping, an average of the
weights, the sums that are logged. The bare step is forward, the same loss, backward and fused update on one batch that
stays. After every step of the loop comes a bare one: what else moves the clock, a neighbour on the machine, say, moves
both alike (stretches of 64 of one, then of the other, were 10 to 20 % apart). The share is that of the sums over a
stretch, which pays once for the order of its samples, 4 ms; median over stretches. docs/performance.md has some.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from pieces.measured import bare_step
from stretch import Enough, prepared, steps_of_loop

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


class _Beside:
    """In the place of preemption.Preemption: makes a bare step between every two steps of the loop, and times both."""

    def __init__(self, bare: Callable[[int], None], steps: int) -> None:
        self._bare, self._steps = bare, steps
        self._begun = math.nan
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def agreed(self, *, wait: bool = False) -> bool:
        now = time.perf_counter()
        if not math.isnan(self._begun):
            self.loop_seconds.append(now - self._begun)
        if len(self.loop_seconds) == self._steps:
            raise Enough
        now = time.perf_counter()
        self._bare(1)
        self._begun = time.perf_counter()
        self.bare_seconds.append(self._begun - now)
        return False


def measure(model: str, options: argparse.Namespace) -> str:
    """A row of the table: the loop's step and the bare one in milliseconds, and the share, with its range."""
    batch_size, precision = options.batch_size, f"--runtime.precision={options.precision}"
    source = f"synthetic:{SHAPES.get(model, '32x32x3')}x{20 * batch_size}"
    sizes = (f"--train.batch_size={batch_size}", f"--train.micro_batch_size={batch_size}")
    with prepared(f"--model.name={model}", f"--data.source={source}", *sizes, precision, *SETTINGS) as training:
        bare = bare_step(training, batch_size)
        stretches = [_Beside(bare, steps) for steps in (5, *[options.steps] * options.stretches)]
        for beside in stretches:
            steps_of_loop(training, beside)
    ours, others = zip(*((sum(s.loop_seconds), sum(s.bare_seconds)) for s in stretches[1:]), strict=True)
    shares = sorted(bare_time / own_time for bare_time, own_time in zip(others, ours, strict=True))
    per_step = 1e3 / options.steps
    times = f"{per_step * statistics.median(ours):.1f} ms | {per_step * statistics.median(others):.1f} ms"
    return f"| {model} | {times} | {statistics.median(shares):.3f} | {shares[0]:.2f} to {shares[-1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny_cnn", "simple_cnn", "fashion_cnn", "cifar10_cnn"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64, help="of a stretch")
    parser.add_argument("--stretches", type=int, default=7)
    options = parser.parse_args()
    machine = f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, {'fp32' if options.precision == 'no' else 'bf16'}, batches of {options.batch_size}")
    print("| network | step of train.py | bare step | share | from, to |\n|---|---|---|---|---|")
    for model in options.models:
        print(measure(model, options), flush=True)


if __name__ == "__main__":
    main()
