"""What checkpoints cost the loop: steps with one every 50 against steps with none, in turn, in one process.

    python benchmarks/checkpoint_cost.py                        # a quarter of an hour on two cores
    python benchmarks/checkpoint_cost.py --model fashion_cnn

Synthetic 32x32 images, batches of 64, fp32. Measured on a 2-core AMD EPYC, steps with checkpoints / steps without:
ResNet-18 (90 MB a checkpoint, 50 steps in 66 s): 0.974, which is noise; fashion_cnn (7 s): 1.007, again 1.004;
tiny_cnn (0.7 s, so a checkpoint about once a second): 1.009 (101 pairs; 1.024, 0.980 and 1.019 in three runs of 41).
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lockstep.launch.accelerator import Launch
from lockstep.models.network import build_model
from lockstep.run.checkpoint import Checkpointer
from lockstep.run.folder import Run
from lockstep.settings.config import CheckpointConfig, Config, ModelConfig
from lockstep.training.progress import Progress

BATCH_SIZE = 64
STEPS_BETWEEN_CHECKPOINTS = 50


class Loop:
    """A training with a checkpointer."""

    def __init__(self, folder: Path, network: str) -> None:
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        torch.manual_seed(0)
        self.model = build_model(ModelConfig(name=network), (3, 32, 32), 10).to(self.device)
        self.images = torch.rand(BATCH_SIZE, 3, 32, 32, device=self.device)
        self.labels = torch.randint(10, (BATCH_SIZE,), device=self.device)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.network, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        config = replace(Config(), checkpoint=CheckpointConfig(keep_last=2))
        run, launch = Run(folder, config, {}), Launch(self.device, 1, 0, 0, "no", 1)
        self.checkpointer = Checkpointer(run, launch, self.accelerator, self.model, self.optimizer, None)
        self.step = 0

    def seconds(self, steps: int, *, saves: bool) -> float:
        """Time of so many steps, with a save at the start of each 50; the last save's rest falls into them too."""
        begun = time.perf_counter()
        for number in range(steps):
            if saves and number % STEPS_BETWEEN_CHECKPOINTS == 0:
                self.checkpointer.save(Progress(step=self.step), is_best=False)
            self.train_step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def train_step(self) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(self.images), self.labels)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each kind")
    parser.add_argument("--model", default="timm/resnet18", help="a name as --model.name takes it")
    options = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs") as folder:  # on the disk that runs are on, not a folder in memory
        loop = Loop(Path(folder), options.model)
        loop.seconds(10, saves=True)
        loop.checkpointer.wait()
        with_saves, without = [], []
        for pair in range(options.pairs):
            for saves in (pair % 2 == 0, pair % 2 == 1):
                (with_saves if saves else without).append(loop.seconds(STEPS_BETWEEN_CHECKPOINTS, saves=saves))
                loop.checkpointer.wait()
        ratio = statistics.median(with_saves) / statistics.median(without)
        print(
            f"{STEPS_BETWEEN_CHECKPOINTS} steps: {statistics.median(without):.2f} s without, "
            f"{statistics.median(with_saves):.2f} s with a checkpoint (medians of {options.pairs}, in turn): "
            f"ratio {ratio:.3f}; device {loop.device.type}, {torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    main()
