"""Every recipe is parsed, builds its network and data pipeline, and takes real steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT

from lockstep.settings.cli import parse_config

RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

# Stand-ins of the right shape for data sets that are not on this machine: shape, and samples for a few steps.
STAND_INS = {
    "embedded:digits": None,
    "torchvision:FashionMNIST": "28x28x1",
    "torchvision:MNIST": "28x28x1",
    "torchvision:CIFAR10": "32x32x3",
    "torchvision:CIFAR100": "32x32x3",
    "folder:data/imagenet": "256x256x3",
}


def test_all_recipes_are_here() -> None:
    assert RECIPES == [
        "cifar100_resnet18.yaml",
        "cifar10_cnn.yaml",
        "cifar10_fast.yaml",
        "cifar10_resnet18.yaml",
        "digits_cnn.yaml",
        "fashion_mnist_cnn.yaml",
        "fashion_mnist_mlp.yaml",
        "fashion_mnist_resnet18.yaml",
        "imagenet_resnet18.yaml",
        "imagenet_resnet50.yaml",
        "imagenet_resnet50_88ep.yaml",
        "imagenet_resnet50_a3.yaml",
        "mnist_simple_cnn.yaml",
        "mnist_tiny_cnn.yaml",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_header_gives_the_command_and_says_what_was_measured(name: str) -> None:
    header = [line for line in (ROOT / "configs" / name).read_text().splitlines() if line.startswith("#")]
    assert any("accelerate launch" in line and "train.py" in line for line in header)
    assert any(line.startswith(("# Measured:", "# Not yet run")) for line in header)


@pytest.mark.parametrize("name", RECIPES)
def test_says_nothing_of_hardware_and_sets_its_microbatch(name: str) -> None:
    config = parse_config(["--config", str(ROOT / "configs" / name)])
    assert config.train.micro_batch_size is not None
    assert config.runtime.threads is None and config.runtime.precision in ("launch", "auto")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "imagenet" in name or "resnet18" in name else [])
        for name in RECIPES
    ],
)
def test_trains(name: str, train_here: Any, tmp_path: Path) -> None:
    config = parse_config(["--config", str(ROOT / "configs" / name)])
    shape = STAND_INS[config.data.source]
    batch = 8 if "imagenet" in name or "resnet" in name or "fast" in name else config.train.batch_size
    source = [] if shape is None else [f"--data.source=synthetic:{shape}x{5 * batch}"]
    run = train_here(
        *("--config", str(ROOT / "configs" / name)),
        *source,
        f"--train.batch_size={batch}",
        f"--train.micro_batch_size={batch // 2}",
        "--train.max_steps=2",
        "--data.workers=0",
        "--log.wandb=disabled",
        "--log.tensorboard=false",
        "--log.figures=false",
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["steps"] == 2
    assert 0 <= summary["test_accuracy"] <= 1
