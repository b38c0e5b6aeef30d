"""`lockstep preview`: what a training would see, told and drawn, and nothing trained."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import image_folder

from lockstep.__main__ import main
from lockstep.data.images import build_data
from lockstep.data.sampler import build_sampler
from lockstep.report.preview import describe, look
from lockstep.settings.cli import parse_config

PLAIN = ["--augment.crop_padding=0", "--augment.rotation=0", "--augment.zoom=0"]
"""The quick start's augmentation, off"""


def pictures(root: Path) -> Path:
    """Two classes in three splits; a training image is twice in train, once in test, and once with another label."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3), ("test", 4)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    for copy in ("train/cat/8.png", "test/cat/4.png", "val/dog/3.png"):
        shutil.copy(root / "train/cat/0.png", root / copy)
    shutil.copy(root / "test/dog/0.png", root / "test/dog/4.png")
    return root


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    source = [f"--data.source=folder:{pictures(tmp_path / 'pets')}", f"--data.cache_dir={tmp_path / 'cache'}"]
    return [*source, "--train.batch_size=8", "--train.micro_batch_size=4", "--model.name=tiny_cnn", "--run.name=pets"]


def test_a_preview_is_told_drawn_and_leaves_no_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--schedule.name=cosine", "--schedule.warmup_epochs=1", "--train.epochs=4", "--optim.lr=0.5"]
    assert main(["preview", *arguments, *more, *PLAIN, "--data.num_classes=3"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("17 train, 7 val, 10 test images of 16x16x3 in 2 classes")
    assert told[1] == "labels: train: 0 (2) to 9 (cat) of a class; none of 1: 2"
    assert told[4] == "batch: 8 images, 2 x 4; the first microbatch:"
    assert told[5].startswith("  as decoded: float32 4x3x16x16, 0 to 1, mean 0.")
    assert told[7].startswith("training: 8 steps, 2 an epoch; learning rate 0.005 at first, 0.5 after step 2, ")
    assert told[8:12] == [
        "duplicates: images whose pixels were there before: 1 of 17 in train, 0 of 7 in val, 1 of 10 in test",
        "duplicates: 1 val image is in train, too",
        "duplicates: 1 test image is in train, too",
        "duplicates: 1 test image is in val, too",
    ]
    assert told[12] == "duplicates: 1 image with several labels (duplicates.png shows them first)"
    folder = tmp_path / "preview" / "pets"
    names = {"labels", "schedule", "samples", "duplicates"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in names} | {"preview.json"}
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5, f"{name} is empty"
    assert not (tmp_path / "runs").exists()
    kept = json.loads((folder / "preview.json").read_text())
    assert kept["labels"] == {"train": [9, 8, 0], "val": [3, 4, 0], "test": [5, 5, 0]}
    assert kept["learning_rates"][2] == [2, 0.5] and len(kept["learning_rates"]) == 8
    assert [len(group) for group in kept["duplicates"]["groups"]] == [4, 2]


def test_the_batch_is_the_one_that_training_begins_with(arguments: list[str], tmp_path: Path) -> None:
    config = parse_config([*arguments, "--augment.mixup=0.4"])
    data = build_data(config, tmp_path, write=False)
    preview = look(config, data)
    assert preview.targets == "float32 4x2, mixed" and preview.after.shape == (4, 3, 16, 16)

    plain = look(parse_config(arguments), data)
    sampler = build_sampler(parse_config(arguments), data.train.drawn_labels, plain.micro_batch_size)
    first = next(iter(sampler.microbatches(range(1), range(1)))).samples.tolist()
    pixels = np.stack([image.numpy() for index in first if (image := data.train.load(index)) is not None]) / 255
    assert plain.before.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-6)
    assert (plain.before.lowest, plain.before.highest) == pytest.approx((pixels.min(), pixels.max()))
    scaled = [(before - mean) / std for before, mean, std in zip(plain.before.mean, data.mean, data.std, strict=True)]
    assert look(parse_config([*arguments, *PLAIN]), data).after.mean == pytest.approx(scaled, abs=1e-5)


def test_streamed_images_are_looked_at_too(arguments: list[str], tmp_path: Path) -> None:
    config = parse_config([*arguments, "--data.memory_budget=0"])
    streamed = look(config, build_data(config, tmp_path, write=False))
    assert streamed.duplicates.looked_at == {"train": 17, "val": 7, "test": 10}
    assert len(streamed.duplicates.groups) == 2


def test_an_even_data_set_and_a_constant_rate_are_said_shortly(tmp_path: Path) -> None:
    source = [f"--data.source={image_folder(tmp_path, ('train', 'test'))}", f"--data.cache_dir={tmp_path}"]
    steady = ["--schedule.name=constant", "--schedule.warmup_epochs=0", "--train.batch_size=4"]
    config = parse_config([*source, *steady, "--train.micro_batch_size=2", "--data.val_fraction=0"])
    data = build_data(config, tmp_path, write=False)
    told = describe(config, data, look(config, data))
    assert not any("stall" in line for line in told)
    assert "labels: train: 5 of each class" in told and any(line.endswith("rate 0.003 throughout") for line in told)


def test_a_plateau_is_not_foretold(tmp_path: Path) -> None:
    config = parse_config(["--schedule.name=plateau", f"--data.cache_dir={tmp_path}"])
    data = build_data(config, tmp_path, write=False)
    told = describe(config, data, look(config, data))
    assert any(line.endswith("0.003 throughout, while validation does not stall") for line in told)
