"""Real trainings: those made to go wrong are named rightly, sound ones draw no complaint."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fork_server import ForkServer
from PIL import Image
from programs import ROOT, environment
from sklearn.datasets import load_digits

pytestmark = [pytest.mark.launch, pytest.mark.slow]

QUIET = (
    "--runtime.threads=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
    "--run.name=run",
)
PLAIN = (*QUIET, "--config", str(ROOT / "configs/mnist_tiny_cnn.yaml"), "--augment.mean=null", "--augment.std=null")
DIGITS = "--data.source=embedded:digits"
SIGMOIDS = f"""
import runpy, sys
from math import prod
from torch import nn
from lockstep.models import network
def deep_sigmoid(config, shape, classes):
    sizes = [prod(shape)] + 10 * [64]
    layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.Sigmoid())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, classes))
network.NETWORKS["deep_sigmoid"] = network.Network(deep_sigmoid, frozenset())
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(environment()) as running:
        yield running


def signs(server: ForkServer, folder: Path, *arguments: str, program: Path = ROOT / "train.py") -> list[str]:
    """What a training is told at its end."""
    printed = server.run(1, folder, *arguments, f"--data.cache_dir={folder / 'cache'}", program=program)
    findings = json.loads((folder / "runs/run/diagnosis.json").read_text())["findings"]
    for finding in findings:
        assert f"diagnosis: {finding['sign']}: {finding['evidence']}; try {finding['advice']}" in printed
    return [finding["sign"] for finding in findings]


def write_digits(root: Path, labels: np.ndarray, **counts: int) -> str:
    """The digits as an image folder, so many in each split, under these labels; returns the source."""
    images, start = (load_digits().images * 15.9375).astype(np.uint8), 0
    for split, count in counts.items():
        for index in range(start, start + count):
            path = root / split / str(labels[index]) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)
        start += count
    return f"--data.source=folder:{root}"


def test_a_rate_that_is_far_too_high_is_named(server: ForkServer, tmp_path: Path) -> None:
    found = signs(server, tmp_path, *PLAIN, DIGITS, "--model.name=simple_cnn", "--optim.lr=0.1", "--train.epochs=8")
    # Which of the two comes first depends on the processor's last bits.
    assert found and set(found) <= {"dead ReLUs", "learning rate too high"}


def test_a_rate_that_is_far_too_low_is_named(server: ForkServer, tmp_path: Path) -> None:
    arguments = (*PLAIN, DIGITS, "--model.name=simple_cnn", "--optim.lr=1e-6", "--train.epochs=8")
    assert signs(server, tmp_path, *arguments) == ["learning rate too low"]


def test_a_depth_of_sigmoids_is_named(server: ForkServer, tmp_path: Path) -> None:
    program = tmp_path / "sigmoids.py"
    program.write_text(SIGMOIDS)
    arguments = (*PLAIN, DIGITS, "--model.name=deep_sigmoid", "--train.epochs=8")
    assert signs(server, tmp_path, *arguments, program=program) == ["vanishing gradients"]


def test_few_images_are_learned_by_heart(server: ForkServer, tmp_path: Path) -> None:
    source = write_digits(tmp_path / "images", load_digits().target, train=50, val=300, test=300)
    batches = ("--train.batch_size=25", "--train.micro_batch_size=25")
    assert signs(server, tmp_path, *PLAIN, source, *batches, "--train.epochs=60") == ["overfitting"]


def test_shuffled_labels_are_named(server: ForkServer, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).permutation(load_digits().target)
    source = write_digits(tmp_path / "images", labels, train=400, test=300)
    assert signs(server, tmp_path, *PLAIN, source, "--train.epochs=80") == ["labels that do not fit"]


def test_noisy_labels_are_named(server: ForkServer, tmp_path: Path) -> None:
    labels, random = load_digits().target.copy(), np.random.default_rng(0)
    wrong = random.choice(len(labels), len(labels) // 5, replace=False)
    labels[wrong] = random.integers(0, 10, len(wrong))
    source = write_digits(tmp_path / "images", labels, train=1200, test=500)
    assert "labels that look wrong" in signs(server, tmp_path, *PLAIN, source, "--train.epochs=15")


@pytest.mark.parametrize(
    "arguments",
    [
        (*QUIET, "--train.epochs=10"),
        (*PLAIN, DIGITS, "--train.epochs=20"),
        (*PLAIN, DIGITS, "--model.name=mlp", "--train.epochs=20"),
        (*PLAIN, DIGITS, "--optim.name=sgd", "--optim.lr=0.05", "--optim.momentum=0.9", "--train.epochs=15"),
        (*PLAIN, DIGITS, "--model.name=timm/resnet10t", "--train.epochs=6"),
        (*PLAIN, DIGITS, "--model.name=simple_cnn", "--schedule.name=cosine", "--augment.translate=0.1"),
    ],
)
def test_sound_runs_draw_no_complaint(server: ForkServer, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert signs(server, tmp_path, *arguments) == []
