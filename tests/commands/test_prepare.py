"""What is fetched before a job without internet, and where it says that it went."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import ROOT, environment

from lockstep.commands.prepare import prepare
from lockstep.errors import UserError
from lockstep.settings.cli import parse_config


def image_folder(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_decodes_into_the_cache_once_and_makes_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    source = image_folder(tmp_path / "pets")
    arguments = [f"--data.source=folder:{source}", f"--data.cache_dir={tmp_path / 'cache'}", "--model.name=tiny_cnn"]
    lines = prepare(parse_config(arguments))
    assert f"files: {source}" in lines and f"decoded images: {tmp_path / 'cache'} (--data.cache_dir)" in lines
    assert any("12 train, 6 val, 6 test images of 16x16x3 in 2 classes" in line for line in lines)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.npy")}
    assert made and not (tmp_path / "runs").exists()
    assert "checked: 18 decoded images" in lines
    prepare(parse_config(arguments))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.npy")} == made

    victim = next(path for path in made if path.name.startswith("val"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    caplog.clear()
    prepare(parse_config(arguments))
    assert len(caplog.records) == 1 and f"is damaged (1 of 6 images, the first: {source}/val/dog/2.png)" in caplog.text
    assert victim.read_bytes() == content

    streamed = prepare(parse_config([*arguments, "--data.memory_budget=0"]))
    assert any(line.startswith("decoded images: none") for line in streamed)


def test_every_broken_image_is_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = image_folder(tmp_path / "pets")
    broken = [source / name for name in ("train/cat/1.png", "train/dog/5.png", "val/dog/0.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    arguments = [f"--data.source=folder:{source}", f"--data.cache_dir={tmp_path / 'cache'}", "--model.name=tiny_cnn"]
    with pytest.raises(UserError, match=r"3 images cannot be decoded, listed above: .*--data.on_error=skip"):
        prepare(parse_config(arguments))
    listed = [record.getMessage() for record in caplog.records if "cannot be decoded" in record.getMessage()]
    assert [line.split(" ")[0] for line in listed] == list(map(str, broken))
    assert all(line.endswith(": replace or remove it") for line in listed)
    lines = prepare(parse_config([*arguments, "--data.on_error=skip"]))
    assert [line for line in lines if line.startswith("skipped: ")] == [f"skipped: {path}" for path in broken]


@pytest.mark.slow
def test_weights_out_of_reach_are_one_line(tmp_path: Path) -> None:
    arguments = ["--model.name=timm/resnet18", "--model.pretrained=true", f"--data.cache_dir={tmp_path}"]
    command = [sys.executable, "-m", "lockstep", "prepare", *arguments]
    away = environment(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    done = subprocess.run(command, cwd=ROOT, env=away, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "resnet18" in line and "hf download" in line and "Traceback" not in done.stderr


def test_weights_are_found_in_the_hubs_cache_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(
        "lockstep.commands.prepare.build_network", lambda *args, **kwargs: built.append(args) or _network()
    )
    config = parse_config(["--model.name=timm/resnet18", "--model.pretrained=true", f"--data.cache_dir={tmp_path}"])
    lines = prepare(config)
    assert built and lines[-1].startswith("published weights: ") and os.sep in lines[-1]


def _network():
    import torch

    return torch.nn.Linear(1, 1)
