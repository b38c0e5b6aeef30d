"""What the promise costs: steps with sums in the one order and deterministic kernels, beside steps without, in turn.

    python benchmarks/exact_cost.py                                                # one process, 8 microbatches
    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml benchmarks/exact_cost.py    # two processes

Both train the same network on the same images in the same program: forward, backward, the exchange of gradients, batch
norm, clipping, the optimizer. Prints the ratio of their times (median of pairs of stretches), what memory the sums of
microbatches take, and what a digest of the weights, of which every log line has one, takes beside a step.

Measured on a 2-core AMD EPYC (AVX512-BF16), medians of pairs. One process, stretches of 20 steps, 21 to 25 pairs,
twice: cifar10_cnn in fp32 1.015 and 1.019, in bf16 1.006 and 1.009. Shorter series: resnet_basic (`--steps 2`) 0.992,
1.035 and 1.009, fashion_cnn 0.973 and 1.004; two processes: cifar10_cnn 1.014, in bf16 1.006, resnet_basic 1.018 and
1.023, fashion_cnn 1.001. A digest: 0.003 to 0.03 steps. On GPUs: not yet run.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from lockstep.data.images import build_data
from lockstep.data.loader import TrainLoader
from lockstep.data.sampler import build_sampler
from lockstep.launch.accelerator import Launch, build_accelerator, end_program
from lockstep.launch.kernels import choose_kernels
from lockstep.run.digest import digest
from lockstep.settings.cli import parse_config
from lockstep.settings.config import Config
from lockstep.training.batchnorm import RunningStatistics
from lockstep.training.gradients import Gradients
from lockstep.training.learner import build_learner
from lockstep.training.loss import total
from lockstep.training.optim import finish_gradients, update
from lockstep.training.tree import nodes_of

MICROBATCHES = 8


class Side:
    """One of the two trainings."""

    def __init__(self, config: Config, accelerator: object, launch: Launch) -> None:
        self.config, self.device = config, launch.device
        data = build_data(config, Path(config.run.root, "exact_cost"), write=False)
        sampler = build_sampler(config, data.train.drawn_labels, config.train.batch_size // MICROBATCHES)
        self.loader = TrainLoader(data.train, sampler, launch, config)
        self.learner = build_learner(config, data, accelerator, launch, resumes=False)
        self.gradients = Gradients(self.learner.network, self.loader.numbers, MICROBATCHES, launch, config.runtime)
        self.statistics = RunningStatistics(self.learner.model, MICROBATCHES, launch)
        self.batches = self.loader.batches(range(10**6), self.learner.transform.rearrange)

    def seconds(self, steps: int) -> float:
        """Time of so many steps."""
        choose_kernels(self.config.runtime, on_cpu=self.device.type == "cpu")
        if not self.config.runtime.exact:
            torch.set_deterministic_debug_mode("default")
        begun = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def step(self) -> None:
        learner = self.learner
        for number in self.loader.numbers:
            images, targets = learner.transform.train_batch(*next(self.batches), (0, 0, number))
            with self.gradients.microbatch(number):
                losses = learner.loss_of(learner.network(images), targets)
                learner.accelerator.backward(total(losses) / self.config.train.batch_size)
            self.statistics.collect(number)
        _, bad = finish_gradients(learner.accelerator, learner.parameters, self.config.optim)
        update(learner.optimizer, bad)
        learner.optimizer.optimizer.zero_grad()
        self.statistics.commit(bad)


def settings_of(model: str, source: str, micro_batch_size: int, precision: str) -> list[str]:
    """The training that both sides make."""
    settings = [f"--model.name={model}", f"--data.source={source}", "--augment.flip=true", "--augment.rotation=0"]
    settings += ["--augment.zoom=0", "--optim.name=sgd", "--optim.momentum=0.9", "--optim.lr=0.01"]
    settings += ["--optim.clip_norm=1", f"--train.batch_size={MICROBATCHES * micro_batch_size}"]
    return [*settings, f"--train.micro_batch_size={micro_batch_size}", f"--runtime.precision={precision}"]


def both_sides(config: Config, accelerator: object, launch: Launch) -> list[Side]:
    """The training in the one order, and the one without."""
    fast = replace(config, runtime=replace(config.runtime, exact=False))
    return [Side(one, accelerator, launch) for one in (config, fast)]


def cost_ratios(sides: list[Side], steps: int, pairs: int) -> list[float]:
    """Times of stretches in the one order as shares of those without, in turn, after one of each to warm up."""
    for side in sides:
        side.seconds(steps)  # memory, DDP's buckets
    ratios = []
    for number in range(pairs):
        times = {side: side.seconds(steps) for side in (sides if number % 2 else sides[::-1])}
        ratios.append(times[sides[0]] / times[sides[1]])
    return ratios


def digest_in_steps(side: Side, pairs: int) -> float:
    """Time of a digest as a share of a step's, median of both in turn."""
    shares = []
    for _ in range(pairs):
        step_seconds, begun = side.seconds(1), time.perf_counter()
        int(digest(side.learner.model, side.learner.average))
        shares.append((time.perf_counter() - begun) / step_seconds)
    return statistics.median(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10_cnn", help="a name as --model.name takes it")
    parser.add_argument("--source", default="synthetic:32x32x3x5120")
    parser.add_argument("--precision", default="no")
    parser.add_argument("--micro_batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of a stretch")
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    settings = settings_of(options.model, options.source, options.micro_batch_size, options.precision)
    config = parse_config(settings)
    accelerator, launch = build_accelerator(config.runtime)
    sides = both_sides(config, accelerator, launch)
    ratios = cost_ratios(sides, options.steps, options.pairs)
    buffers = max(len(nodes_of(range(end), MICROBATCHES)) for end in range(1, len(sides[0].loader.numbers) + 1))
    size = sum(p.numel() * p.element_size() for p in sides[0].learner.model.parameters()) / 1e6
    launch.say(
        f"{options.model}, {launch.precision_name}, processes: {launch.num_processes}, microbatches of each: "
        f"{len(sides[0].loader.numbers)}; "
        f"exact / not exact {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
        f"a digest takes {digest_in_steps(sides[0], options.pairs):.3f} steps; "
        f"up to {buffers} sums of {size:.1f} MB kept beside the newest gradients, instead of 0"
    )
    end_program()


if __name__ == "__main__":
    main()
