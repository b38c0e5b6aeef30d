"""train.py as a user starts it: the quick start, the run folder, resuming, and what bad input gets."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from programs import QUICK, ROOT, finish, launch, launch_command, read_lines, start
from safetensors.torch import load_file

from lockstep.errors import UserError
from lockstep.run.history import is_speed
from lockstep.settings.cli import parse_config
from lockstep.settings.yaml import load_config

pytestmark = pytest.mark.launch


def start_quickly(place: Path, *arguments: str, **extra: str) -> tuple[Path, str]:
    """Trains as `make train` does; returns the run and what it printed."""
    done = launch(f"--data.cache_dir={place / 'cache'}", *arguments, cwd=place, HOME=str(place), **extra)
    assert done.returncode == 0, done.stderr
    (run,) = (place / "runs").iterdir()
    return run, done.stdout + done.stderr


@pytest.fixture(scope="module")
def short_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three epochs of the quick start, and what was printed, with a line for every module that Python imported."""
    place = tmp_path_factory.mktemp("quick_start")
    return start_quickly(place, "--train.epochs=3", PYTHONPROFILEIMPORTTIME="1")


@pytest.fixture(scope="module")
def short_run(short_start: tuple[Path, str]) -> Path:
    return short_start[0]


# Up to seconds each: torch's compiler; DTensor and the algebra it draws in, by a check of a trace; the digits, which
# come with scikit-learn; networks that are not asked for.
@pytest.mark.parametrize("module", ["torch._dynamo", "torch.distributed.tensor", "sympy", "sklearn", "scipy", "timm"])
def test_quick_start_imports_nothing_that_it_does_not_use(module: str, short_start: tuple[Path, str]) -> None:
    imported = {line.rpartition("|")[2].strip() for line in short_start[1].splitlines() if "import time:" in line}
    assert {"torch", "wandb", "tensorboard", "matplotlib"} <= imported and module not in imported


@pytest.mark.slow
def test_quick_start_reaches_98_percent(tmp_path: Path) -> None:
    run, printed = start_quickly(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert run.name == parse_config([]).run.name and run.name.startswith("digits_cnn-")
    assert summary["state"] == "finished" and summary["restarts"] == 0
    assert summary["test_accuracy"] >= 0.98
    assert f"test accuracy {summary['test_accuracy']:.2%}" in printed
    assert summary["images_per_second"] > 0 and summary["wall_seconds"] >= summary["train_seconds"]


def test_run_folder_is_complete(short_run: Path) -> None:
    run, arguments = short_run, [f"--data.cache_dir={short_run.parents[1] / 'cache'}", "--train.epochs=3"]
    assert load_config(run / "config.yaml") == parse_config(arguments)
    (start_entry,) = json.loads((run / "environment.json").read_text())
    assert start_entry["processes"] == 1 and start_entry["accumulation"] == 2 and start_entry["precision"] == "no"
    assert torch.__version__.startswith(start_entry["versions"]["torch"])
    assert len(json.loads((run / "split.json").read_text())["val_indices"]) == 144
    for name in ("curves", "confusion_matrix", "samples"):
        assert Image.open(run / "figures" / f"{name}.png").size[0] > 300
    best, last = (load_file(run / "checkpoints" / link / "model.safetensors") for link in ("best", "last"))
    assert best.keys() == last.keys() and len(best) > 10
    leftovers = {path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step_")}
    assert leftovers == {"best", "best_copy", "last"}


def test_metrics_have_every_record_once(short_run: Path) -> None:
    lines = read_lines(short_run)
    assert all({"step", "epoch", "position", "split", "loss", "accuracy"} <= line.keys() for line in lines)
    train = [line["step"] for line in lines if line["split"] == "train"]
    val = [line for line in lines if line["split"] == "val"]
    assert train == [20, 40, 60] and [line["epoch"] for line in val] == [1, 2, 3]
    assert all(line["position"] == line["step"] * 64 for line in lines)
    assert [line["split"] for line in lines].count("test") == 1
    assert val[-1]["train_val_loss_ratio"] == pytest.approx(val[-1]["train_loss"] / val[-1]["loss"])


def test_tensorboard_and_wandb_hold_the_same_scalars(short_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = short_run
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    expected = [(line["step"], line["loss"]) for line in read_lines(run) if line["split"] == "val"]
    logged = [(event.step, event.value) for event in events.Scalars("val/loss")]
    assert [step for step, _ in logged] == [step for step, _ in expected]
    assert [value for _, value in logged] == pytest.approx([value for _, value in expected], rel=1e-6)
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert next(offline.glob("run-*.wandb")).stat().st_size > 10_000


@pytest.mark.parametrize("split", ["test", "val"])
def test_eval_prints_what_train_measured_to_the_last_digit(short_run: Path, split: str) -> None:
    run = short_run
    done = launch("--run", str(run), "--split", split, cwd=run.parents[1], program="eval.py")
    assert done.returncode == 0, done.stderr
    best_step = json.loads((run / "summary.json").read_text())["best_step"]
    (line,) = (
        record
        for record in read_lines(run)
        if record["split"] == split and (split == "test" or record["step"] == best_step)
    )
    assert f"accuracy {line['accuracy']!r} " in done.stdout and f"loss {line['loss']!r}" in done.stdout
    rows = [row.split() for row in done.stdout.splitlines() if row[:1].isdigit()]
    assert [row[0] for row in rows] == list("0123456789")
    support = [int(row[4]) for row in rows]
    recall = [float(row[2]) for row in rows]
    correct = sum(round(r * s) for r, s in zip(recall, support, strict=True))
    assert correct == round(line["accuracy"] * sum(support))
    import pyarrow.parquet as pq

    table = pq.read_table(run / f"predictions_{split}.parquet").to_pydict()
    assert len(set(table["sample"])) == sum(support)
    hits = [a == b for a, b in zip(table["label"], table["prediction"], strict=True)]
    assert np.mean(hits) == pytest.approx(line["accuracy"], abs=1e-12)


def test_same_command_shows_the_finished_result(short_run: Path) -> None:
    run = short_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    done = launch(f"--data.cache_dir={run.parents[1] / 'cache'}", "--train.epochs=3", cwd=run.parents[1])
    assert done.returncode == 0, done.stderr
    assert "is finished: test accuracy" in done.stdout and "--run.seed" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    settings = (
        *QUICK,
        "--train.epochs=8",
        "--runtime.threads=1",
        "--train.ema_decay=0.99",
        "--augment.mixup=0.2",
        "--schedule.name=plateau",
        "--checkpoint.every_steps=3",
        "--log.every_steps=1",
        f"--data.cache_dir={tmp_path / 'cache'}",
    )
    whole = launch(*settings, "--run.name=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    killed = start([*launch_command(1, "train.py"), *settings, "--run.name=killed"], tmp_path)
    history = tmp_path / "runs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (history.exists() and '"step": 17,' in history.read_text()):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    finish(killed, 30)
    resumed = launch(*settings, "--run.name=killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((tmp_path / "runs" / "killed" / "summary.json").read_text())
    assert summary["restarts"] == 1
    for file in ("model", "ema"):
        a, b = (
            load_file(tmp_path / "runs" / name / f"checkpoints/last/{file}.safetensors") for name in ("whole", "killed")
        )
        assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (
        [
            {key: value for key, value in line.items() if not is_speed(key)}
            for line in read_lines(tmp_path / "runs" / name)
        ]
        for name in ("whole", "killed")
    )
    assert a == b


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), images: int = 12) -> Path:
    """A folder of small random PNG files, root/class/*.png."""
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(images):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name / f"{number}.png")
    return root


SMALL = (*QUICK, "--train.batch_size=4", "--train.micro_batch_size=4", "--train.epochs=1", "--model.name=tiny_cnn")


def test_truncated_image_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    broken = folder / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    done = launch(*SMALL, f"--data.source=folder:{folder}", f"--data.cache_dir={tmp_path / 'cache'}", cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and str(broken) in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_truncated_image_can_be_skipped(tmp_path: Path, train_here: Any) -> None:
    folder = image_folder(tmp_path / "pets")
    for number in range(3):
        (folder / "dog" / f"{number}.png").write_bytes(b"not an image")
    run = train_here(*SMALL, f"--data.source=folder:{folder}", "--data.on_error=skip")
    assert json.loads((run / "summary.json").read_text())["state"] == "finished"
    assert json.loads((run / "summary.json").read_text())["skipped_images"] == 3


def test_images_that_a_streamed_run_skips_are_in_its_lines_and_its_summary(tmp_path: Path, train_here: Any) -> None:
    folder = tmp_path / "pets"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (image_folder(folder / split, (name,)) / name / "0.png").write_bytes(b"not an image")
    stream = ("--data.memory_budget=0", "--augment.mean=[0.5]", "--augment.std=[0.5]", "--data.val_fraction=0")
    run = train_here(*SMALL, f"--data.source=folder:{folder}", "--data.on_error=skip", "--log.every_steps=1", *stream)
    lines = [line.get("skipped_images", 0) for line in read_lines(run)]
    assert sum(lines[:-1]) == 2 and lines[-1] == 2, "of training, and of the test"
    assert json.loads((run / "summary.json").read_text())["skipped_images"] == 4


def test_balanced_sampling_with_skipped_images_is_the_same_cached_and_streamed(
    tmp_path: Path, train_here: Any, fresh_accelerate: None
) -> None:
    folder = image_folder(tmp_path / "pets")
    (folder / "dog" / "1.png").write_bytes(b"not an image")
    runs = [
        train_here(
            *(*SMALL, f"--data.source=folder:{folder}", "--data.on_error=skip", "--data.sampling=balanced"),
            *("--augment.mean=[0.4]", "--augment.std=[0.3]", f"--data.memory_budget={budget}", f"--run.name={budget}"),
        )
        for budget in (2, 0)
    ]
    lines = [[line for line in read_lines(run) if line["split"] == "train"] for run in runs]
    assert any("skipped_images" in line for line in lines[0])
    assert [line["digest"] for line in lines[0]] == [line["digest"] for line in lines[1]]


def test_batch_norm_of_single_values_is_one_line(train_here: Any) -> None:
    with pytest.raises(UserError, match="a batch norm sees one value a channel.*Raise --train.micro_batch_size"):
        train_here(*QUICK, "--model.name=timm/test_resnet", "--model.dropout=0", "--train.micro_batch_size=1")


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, train_here: Any, fresh_accelerate: None) -> None:
    """With a validation split of its own: 20 of 135 images were deleted, and the order moved without a word."""
    folder = tmp_path / "pets"
    for split in ("train", "val"):
        image_folder(folder / split)
    arguments = (*SMALL, f"--data.source=folder:{folder}", "--run.name=x")
    train_here(*arguments, "--run.max_hours=1e-9")
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy, copy_function=shutil.copy)
    (folder / "train" / "dog" / "1.png").unlink()
    with pytest.raises(UserError, match=r"begun with other data \(content \w+ -> \w+, train 24 -> 23\)"):
        train_here(*arguments)
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)  # other inodes and times, the same images
    assert json.loads((train_here(*arguments) / "summary.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.source=folder:nowhere"], "nowhere"),
        (["--data.source=torchvision:FashionMNIST"], "data"),
        (["--data.source=torchvision:FashonMNIST"], "FashionMNIST"),
        (["--model.name=cifar10_cnn"], r"8x8.*22x22"),
        (["--model.name=timm/resnet81"], "resnet18"),
        (["--train.batch_size=4096", "--train.micro_batch_size=64"], r"1294.*4096"),
        (["--schedule.warmup_epochs=9"], r"warmup_epochs=9"),
        (["--data.num_classes=3"], "10 classes"),
        (["--augment.grayscale=0.5"], "grey"),
        (["--augment.mixup=0.2", "--train.micro_batch_size=1"], "mix the images of a microbatch, and it has one only"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    settings: list[str], message: str, train_here: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train_here(*QUICK, *settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("runs/*/config.yaml"))


def test_empty_class_is_named(tmp_path: Path, train_here: Any) -> None:
    folder = image_folder(tmp_path / "pets")
    (folder / "horse").mkdir()
    with pytest.raises(ValueError, match="horse"):
        train_here(*SMALL, f"--data.source=folder:{folder}")


def test_folder_of_other_settings_is_refused_with_the_changed_keys(train_here: Any, fresh_accelerate: None) -> None:
    run = train_here(*QUICK, "--run.name=mine", "--train.max_steps=1")
    config = (run / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.003 -> 0\.1.*--run\.name"):
        train_here(*QUICK, "--run.name=mine", "--train.max_steps=1", "--optim.lr=0.1")
    assert (run / "config.yaml").read_text() == config


def test_misspelt_setting_is_one_line_through_the_launcher(tmp_path: Path) -> None:
    done = launch("--optim.learning_rate=3", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("error: unknown setting --optim.learning_rate.")
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_streamed_and_cached_sets_train_alike(train_here: Any) -> None:
    settings = (*QUICK, "--train.max_steps=3", "--augment.mean=[0.3]", "--augment.std=[0.3]", "--runtime.threads=1")
    runs = [
        train_here(*settings, f"--run.name={name}", *more)
        for name, more in (
            ("cached", []),
            ("streamed", ["--data.memory_budget=0"]),
            ("workers", ["--data.memory_budget=0", "--data.workers=2"]),
        )
    ]
    weights = [load_file(run / "checkpoints/last/model.safetensors") for run in runs]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in other)


def test_model_summary_is_printed(train_here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(*QUICK, "--train.max_steps=1", "--model.summary=true")
    printed = capsys.readouterr().out
    assert "BatchNorm2d" in printed and "FLOPs" in printed and "parameters" in printed


def test_loop_is_in_plain_sight() -> None:
    lines = (ROOT / "train.py").read_text().splitlines()
    assert len(lines) <= 180
    assert any("for number in t.loader.numbers:" in line for line in lines) and any(
        "accelerator.backward" in line for line in lines
    )
