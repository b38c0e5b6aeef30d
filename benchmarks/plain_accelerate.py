"""What one would write with Accelerate alone: the usual loop, for comparison with train.py.

    accelerate launch benchmarks/plain_accelerate.py --out result.json --micro_batch_size 64

Same data, network, loss, kinds of augmentation, optimizer and global batch as train.py with the settings of
launch_distance.py or speed.py; order, dropout, augmentation and batch norm as the libraries do them. Writes the images
per second of the epochs, and weights beside it where asked for.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_model
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lockstep.data.sources.kinds import open_source
from lockstep.data.split import draw_validation_split
from lockstep.models.network import build_model
from lockstep.settings.config import DataConfig, ModelConfig


class Images(Dataset):
    """PIL images in memory, a tenth held out."""

    def __init__(self, source: str) -> None:
        self.split = open_source(DataConfig(source=source)).splits["train"]
        self.num_classes = int(self.split.labels.max()) + 1
        self.rows, _ = draw_validation_split(self.split.labels, 0.1, 0)
        self.images = [self.split.read(int(row)) for row in self.rows]
        size = self.images[0].height
        moves = [v2.RandomAffine(degrees=10, scale=(0.9, 1.1))] if size == 8 else [v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(
            [
                v2.RandomCrop(size, padding=size // 8),
                *moves,
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.3], [0.38]),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.split.labels[int(self.rows[index])])


def build_parts(options: argparse.Namespace, accelerator: Accelerator) -> tuple[Any, Any, Any]:
    data = Images(options.source)
    channels, size = len(data.images[0].getbands()), data.images[0].size
    model = build_model(ModelConfig(name=options.model, dropout=0.1), (channels, *size), data.num_classes)
    loader = DataLoader(
        data,
        batch_size=options.micro_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=options.workers > 0,
    )
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9), loader)


def train_epoch(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> Iterator[None]:
    """Yields after every step."""
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--source", default="embedded:digits")
    parser.add_argument("--model", default="fashion_cnn")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--micro_batch_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--save_every_steps", type=int, default=0)
    options = parser.parse_args()
    on_cpu = not torch.accelerator.is_available()
    accumulation = options.batch_size // (options.micro_batch_size * Accelerator(cpu=on_cpu).num_processes)
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=accumulation)
    set_seed(0)
    model, optimizer, loader = build_parts(options, accelerator)
    speeds, step = [], 0
    for _ in range(options.epochs):
        begun, first = time.perf_counter(), step
        for _ in train_epoch(accelerator, model, optimizer, loader):
            step += 1
            if options.save_every_steps and step % options.save_every_steps == 0 and accelerator.is_main_process:
                save_model(accelerator.unwrap_model(model), str(Path(options.out).with_name(f"{step}.safetensors")))
        speeds.append((step - first) * options.batch_size / (time.perf_counter() - begun))
    if accelerator.is_main_process:
        Path(options.out).write_text(json.dumps({"images_per_second": speeds}))


if __name__ == "__main__":
    main()
