"""What one would write with Accelerate alone: the usual loop on the digits, for comparison with train.py.

    accelerate launch benchmarks/plain_accelerate.py --out losses.json --micro_batch_size 64

Same data, network, loss, kinds of augmentation and (see launch_curves.py) optimizer and global batch; order, dropout,
augmentation and batch norm as the libraries do them.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lockstep.config import DataConfig, ModelConfig
from lockstep.data import draw_validation_split, open_source
from lockstep.models import build_model

BATCH_SIZE, EPOCHS = 256, 30


class Digits(Dataset):
    def __init__(self) -> None:
        split = open_source(DataConfig()).splits["train"]
        self.rows, _ = draw_validation_split(split.labels, 0.1, 0)
        self.split = split
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(8, padding=1),
                v2.RandomAffine(degrees=10, scale=(0.9, 1.1)),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.3], [0.38]),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = int(self.rows[index])
        return self.transform(self.split.read(row)), int(self.split.labels[row])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--micro_batch_size", type=int, default=64)
    options = parser.parse_args()
    on_cpu = not torch.accelerator.is_available()
    processes = Accelerator(cpu=on_cpu).num_processes
    accumulation = BATCH_SIZE // (options.micro_batch_size * processes)
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=accumulation)
    set_seed(0)
    model = build_model(ModelConfig(dropout=0.1), (1, 8, 8), 10)
    loader = DataLoader(Digits(), batch_size=options.micro_batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses, window = [], []
    for _ in range(EPOCHS):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            window.append(accelerator.gather(loss.detach()).mean().item())
            if accelerator.sync_gradients:
                losses.append(sum(window) / len(window))
                window = []
    if accelerator.is_main_process:
        with open(options.out, "w") as file:
            json.dump(losses, file)


if __name__ == "__main__":
    main()
