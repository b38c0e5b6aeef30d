"""Every recipe is parsed, builds its network and data pipeline, and takes real steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from programs import CIFAR10, ROOT

from lockstep.settings.cli import parse_config
from lockstep.settings.yaml import load_config

RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

# Stand-ins of the right shape for data sets that are not on this machine: shape, and samples for a few steps.
STAND_INS = {
    "embedded:digits": None,
    "torchvision:FashionMNIST": "28x28x1",
    "torchvision:MNIST": "28x28x1",
    "torchvision:CIFAR10": "32x32x3",
    "torchvision:CIFAR100": "32x32x3",
    "folder:data/imagenet": "256x256x3",
    "folder:my_photos": "64x64x3",
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
        "finetune_folder.yaml",
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


LARGE = ("finetune", "imagenet", "resnet18")
"""In the names of recipes whose networks take seconds a step on a core"""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if any(part in name for part in LARGE) else []) for name in RECIPES],
)
def test_trains(name: str, train_here: Any, tmp_path: Path) -> None:
    config = parse_config(["--config", str(ROOT / "configs" / name)])
    shape = STAND_INS[config.data.source]
    batch = 8 if any(part in name for part in (*LARGE, "resnet", "fast")) else config.train.batch_size
    source = [] if shape is None else [f"--data.source=synthetic:{shape}x{5 * batch}"]
    run = train_here(
        *("--config", str(ROOT / "configs" / name)),
        *source,
        f"--train.batch_size={batch}",
        f"--train.micro_batch_size={batch // 2}",
        *(["--model.pretrained=false"] if config.model.pretrained else []),
        "--train.max_steps=2",
        "--data.workers=0",
        "--log.wandb=disabled",
        "--log.tensorboard=false",
        "--log.figures=false",
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["steps"] == 2
    assert 0 <= summary["test_accuracy"] <= 1


def photos(root: Path) -> str:
    """Two classes of twenty real JPEG files, one of them sideways, one in the colours of print, one grey."""
    import pyarrow.parquet as pq

    table = pq.read_table(next((CIFAR10 / "data").glob("test-*.parquet")))
    columns = table.slice(0, 1000).to_pydict()
    for name, label in (("cat", 3), ("ship", 8)):
        (root / name).mkdir(parents=True)
        chosen = [image["bytes"] for image, other in zip(*columns.values(), strict=True) if other == label][:20]
        for number, content in enumerate(chosen):
            (root / name / f"{number}.jpg").write_bytes(content)
    tags = Image.Exif()
    tags[0x0112] = 6
    for number, mode in enumerate(("RGB", "CMYK", "L")):
        with Image.open(root / "cat" / f"{number}.jpg") as image:
            image.convert(mode).save(root / "cat" / f"{number}.jpg", exif=tags)
    return f"folder:{root}"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"{CIFAR10} is absent")
def test_own_photos_in_one_command(train_here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file of weights for other classes: split, portions and sizes are chosen, written down and kept."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_efficientnet", num_classes=5).state_dict(), tmp_path / "own.safetensors")
    command = (
        *("--config", str(ROOT / "configs" / "finetune_folder.yaml"), f"--data.source={photos(tmp_path / 'photos')}"),
        *("--model.name=timm/test_efficientnet", f"--model.checkpoint={tmp_path}/own.safetensors"),
        *("--augment.image_size=32", "--train.max_steps=6", "--data.workers=0", "--log.wandb=disabled"),
        *("--log.tensorboard=false", "--log.figures=false"),
    )
    run = train_here(*command, "--run.max_hours=0.000001")
    assert json.loads((run / "summary.json").read_text())["state"] == "preempted"
    said = capsys.readouterr().out
    chose = "chose --train.batch_size=16 and --train.epochs=50, which is 50 steps"
    assert f"29 training images in 2 classes: {chose}" in said
    assert "images as in the training of the published weights: 32x32, augment.eval_crop=0.95, mean " in said
    kept = load_config(run / "config.yaml")
    assert (kept.train.batch_size, kept.train.epochs, kept.augment.eval_crop) == (16, 50, 0.95)
    assert kept.augment.mean is not None
    split = json.loads((run / "split.json").read_text())
    assert len(split["test_indices"]) == 8 and len(split["val_indices"]) == 3
    assert train_here(*command) == run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["steps"] == 6 and summary["restarts"] == 1
