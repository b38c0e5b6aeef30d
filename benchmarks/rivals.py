"""The same training as others would write it, for speed.py: each says how many images a second it trains.

    python benchmarks/rivals.py timm_like --source synthetic:32x32x3x2560 --model cifar10_cnn --out result.json

Network, images, crops and flips, loss, optimizer and batch are those of plain_accelerate.py; the loops, and what they
are fed by, are their own kinds'. Lightning and transformers are needed by two of them only.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_accelerate import Images
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from lockstep.models.network import build_model
from lockstep.settings.config import ModelConfig

MEAN, STD = 0.3, 0.38
Rival = Callable[[nn.Module, Images, argparse.Namespace], list[float]]


def by_hand(model: nn.Module, data: Images, options: argparse.Namespace) -> list[float]:
    """A first loop in PyTorch: fp32, no workers, Adam, the loss read in every step."""
    loader = DataLoader(data, batch_size=options.batch_size, shuffle=True, drop_last=True)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch() -> None:
        running_loss = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()

    return _timed(epoch, loader, options)


def timm_like(model: nn.Module, data: Images, options: argparse.Namespace) -> list[float]:
    """As timm's train.py: PIL transforms and uint8 collation in workers, normalised in batches; channels_last, AMP."""
    from timm.data.loader import fast_collate
    from timm.data.transforms import ToNumpy
    from timm.optim import create_optimizer_v2

    moves = [transforms.RandomCrop(data.images[0].height, padding=4), transforms.RandomHorizontalFlip()]
    data.transform = transforms.Compose([*moves, ToNumpy()])
    loader = _with_workers(data, options, collate_fn=fast_collate)
    model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, weight_decay=0.0)

    def epoch() -> None:
        for images, labels in loader:
            pixels = images.float().sub_(255 * MEAN).div_(255 * STD).contiguous(memory_format=torch.channels_last)
            with _autocast(options):
                loss = F.cross_entropy(model(pixels), labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return _timed(epoch, loader, options)


def lightning(model: nn.Module, data: Images, options: argparse.Namespace) -> list[float]:
    """A LightningModule and Lightning's Trainer."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=0.1)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    class Clock(lightning.Callback):
        marks: list[float] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_train_end(self, *_: Any) -> None:
            self.marks.append(time.perf_counter())

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        max_epochs=options.epochs,
        callbacks=[Clock()],
        enable_model_summary=False,
        **quiet,
    )
    loader = _with_workers(data, options)
    trainer.fit(Module(), loader)
    return _speeds(Clock.marks, loader, options)


def hf_trainer(model: nn.Module, data: Images, options: argparse.Namespace) -> list[float]:
    """Hugging Face's Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.model(pixel_values)
            return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.1), "logits": logits}

    class Clock(TrainerCallback):
        marks: list[float] = []

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

    def collate(samples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        images, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    arguments = TrainingArguments(
        output_dir=str(Path(options.out).with_suffix("")),
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        bf16=options.precision == "bf16",
        use_cpu=True,
        dataloader_num_workers=options.workers,
        dataloader_persistent_workers=options.workers > 0,
        dataloader_drop_last=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    Trainer(Classifier(), arguments, collate, data, optimizers=(optimizer, None), callbacks=[Clock()]).train()
    steps = range(0, len(data) - options.batch_size + 1, options.batch_size)
    return _speeds(Clock.marks, steps, options)


def bare_step(model: nn.Module, data: Images, options: argparse.Namespace) -> list[float]:
    """What no training can be faster than: network, loss and fused update on one batch that is there."""
    model = model.to(memory_format=torch.channels_last)
    images, labels = next(iter(DataLoader(data, batch_size=options.batch_size)))
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    steps = range(0, len(data) - options.batch_size + 1, options.batch_size)

    def epoch() -> None:
        for _ in steps:
            with _autocast(options):
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return _timed(epoch, steps, options)


RIVALS: dict[str, Rival] = {
    "by_hand": by_hand,
    "timm_like": timm_like,
    "lightning": lightning,
    "hf_trainer": hf_trainer,
    "bare_step": bare_step,
}


def _autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16")


def _with_workers(data: Images, options: argparse.Namespace, **more: Any) -> DataLoader[Any]:
    return DataLoader(
        data,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        **more,
    )


def _timed(epoch: Callable[[], None], batches: Any, options: argparse.Namespace) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(options.epochs):
        epoch()
        marks.append(time.perf_counter())
    return _speeds(marks, batches, options)


def _speeds(marks: list[float], batches: Any, options: argparse.Namespace) -> list[float]:
    """Images per second of each epoch, from when they began and the last one ended."""
    images = len(batches) * options.batch_size
    return [images / (end - begin) for begin, end in zip(marks[:-1], marks[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("--out", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = Images(options.source)
    channels, size = len(data.images[0].getbands()), data.images[0].size
    model = build_model(ModelConfig(name=options.model, dropout=0.1), (channels, *size), data.num_classes).train()
    speeds = RIVALS[options.rival](model, data, options)
    Path(options.out).write_text(json.dumps({"images_per_second": speeds}))
    print(f"{options.rival}: {statistics.median(speeds[1:]):,.0f} images/s")


if __name__ == "__main__":
    main()
