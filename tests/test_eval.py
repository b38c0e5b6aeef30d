"""eval.py in this process, on a network that was never trained: other data, other settings, images without labels."""

import csv
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hub import put_on_hub
from odd_images import BROKEN, write_odd_images
from PIL import Image
from programs import ROOT
from safetensors.torch import save_file

from lockstep.data.images import build_data
from lockstep.errors import UserError
from lockstep.files import write_json
from lockstep.models.network import build_model
from lockstep.run.inputs import write_input
from lockstep.settings.cli import parse_config, parse_evaluation
from lockstep.settings.yaml import config_to_yaml


@pytest.fixture
def run(tmp_path: Path, cache_dir: Path) -> Path:
    """A run folder of the digits with first weights."""
    config = parse_config(["--model.name=tiny_cnn", "--log.wandb=disabled", f"--data.cache_dir={cache_dir}"])
    folder = tmp_path / "runs" / "digits"
    best = folder / "checkpoints" / "best"
    best.mkdir(parents=True)
    data = build_data(config, folder, write=True)
    torch.manual_seed(0)
    save_file(build_model(config.model, data.image_shape, data.num_classes).state_dict(), best / "model.safetensors")
    (folder / "config.yaml").write_text(config_to_yaml(config))
    write_json(folder / "summary.json", {"data": data.identity})
    write_input(folder, data)
    return folder


@pytest.fixture
def evaluate_here(
    fresh_accelerate: None, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """`evaluate_here(*arguments)`: what eval.py prints; pictures of a split, which take seconds, are left out."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("lockstep.report.evaluation.drawings_of_split", lambda *_: [])
    monkeypatch.setattr("lockstep.report.suspicious.plot_samples", lambda *_: None)

    def evaluate(*arguments: str) -> str:
        program = importlib.import_module("eval")
        program.evaluate_checkpoint(
            parse_evaluation([f"--run={run}", f"--checkpoint={run}/checkpoints/best/model.safetensors", *arguments])
        )
        return capsys.readouterr().out

    return evaluate


def notes_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("note:")]


def digits(root: Path, run: Path, classes: tuple[str, ...]) -> dict[str, int]:
    """Files root/test/<class>/<row>.png of the test set, the same in root/train; returns the row of each, by name."""
    config = parse_config(["--config", str(run / "config.yaml")])
    test = build_data(config, run, write=False).test
    for row, label in enumerate(test.labels.tolist()):
        for split in ("train", "test") if str(label) in classes else ():
            path = root / split / str(label) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = test.load(row)
            assert image is not None
            Image.fromarray(image.numpy()[:, :, 0]).save(path)
    return {f"{label}/{row}.png": row for row, label in enumerate(test.labels.tolist()) if str(label) in classes}


def test_other_data_with_some_of_the_classes_are_matched_by_name(evaluate_here: Any, run: Path, tmp_path: Path) -> None:
    assert notes_of(evaluate_here()) == []
    whole = pq.read_table(run / "predictions_test.parquet").to_pydict()
    digits(tmp_path / "some", run, ("3", "7"))
    printed = evaluate_here(f"--data.source=folder:{tmp_path / 'some'}")  # whose split is not that of the run
    assert pq.read_table(run / "predictions_test.parquet").to_pydict() == whole, "results of other data took the place"
    (note,) = notes_of(printed)
    assert "2 of the network's 10 classes" in note
    (place,) = (run / "evaluations").iterdir()
    found = pq.read_table(place / "predictions_test.parquet").to_pydict()
    for image, label, probabilities in zip(found["image"], found["label"], found["probabilities"], strict=True):
        row = int(Path(image).stem)
        assert whole["label"][row] == label == Path(image).parent.name
        # With the mean of the training, which is not that of these images.
        assert whole["probabilities"][row] == pytest.approx(probabilities, abs=1e-6)


def test_published_weights_are_evaluated_as_they_were_trained(
    evaluate_here: Any,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import timm

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    networks = {count: timm.create_model("test_resnet", num_classes=count).eval() for count in (10, 1000)}
    sizes = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    for count, network in networks.items():
        described = {"architecture": "test_resnet", "num_classes": count, "pretrained_cfg": sizes}
        put_on_hub(network, tmp_path / "hub", f"me--of_{count}", **described)
    places = [f"--run.root={tmp_path / 'runs'}", f"--data.cache_dir={cache_dir}", "--log.wandb=disabled"]
    images = [*places, "--data.source=synthetic:100x96x3x40", "--data.val_fraction=0"]

    def evaluate(*flags: str) -> Any:
        request = parse_evaluation(["--model.name=timm/test_resnet", *images, *flags])
        importlib.import_module("eval").evaluate_checkpoint(request)
        return request

    request = evaluate("--model.checkpoint=hf_hub:me/of_10")
    found = pq.read_table(request.folder / "predictions_test.parquet").to_pydict()
    data = build_data(replace(request.config, augment=with_sizes(request.config.augment)), None, write=False)
    first = data.test.load(0).permute(2, 0, 1)[None] / 255
    pixels = (first - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    assert found["probabilities"][0] == pytest.approx(networks[10](pixels).softmax(1)[0].tolist(), abs=1e-5)
    evaluate("--model.checkpoint=hf_hub:me/of_10", "--split=train")
    (order, again) = notes_of(capsys.readouterr().out)  # none of a training on these images: there was no run
    assert order == again and order.endswith("in the order of the classes: 0, 1, 2, ...")
    with pytest.raises(UserError, match="are for 1000 classes, and the data have 10"):
        evaluate("--model.checkpoint=hf_hub:me/of_1000")
    with pytest.raises(UserError, match="new first layer for images of 64x64: set --model.stem=imagenet"):
        evaluate("--model.checkpoint=hf_hub:me/of_10", "--augment.image_size=64")


def with_sizes(augment: Any) -> Any:
    """As the description of the weights has them."""
    return replace(augment, image_size=96, eval_crop=0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_departures_from_the_training_are_told(evaluate_here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (note,) = notes_of(evaluate_here("--augment.mean=[0.5]", "--augment.std=[0.5]"))
    assert "normalised by mean 0.5 and std 0.5 here" in note
    with pytest.raises(UserError, match="another network"):  # tiny_cnn's last layer knows the size
        evaluate_here("--augment.image_size=16")
    assert "note: images are 16x16 here, and were 8x8 in training" in capsys.readouterr().out
    assert "was trained on these images" in notes_of(evaluate_here("--split=train"))[0]
    with pytest.raises(UserError, match=r"split.json was drawn for other data \(val_fraction"):
        evaluate_here("--temperature=fit", "--data.val_fraction=0")


def test_a_temperature_is_fitted_to_the_validation_split(evaluate_here: Any, run: Path) -> None:
    printed = evaluate_here("--temperature=fit")
    written = json.loads((run / "metrics_test.json").read_text())
    assert written["temperature"]["from"] == "fitted to the val split"
    evaluate_here("--temperature=fit", "--split=val")
    on_val = json.loads((run / "metrics_val.json").read_text())
    assert on_val["temperature"] == written["temperature"]
    assert on_val["calibrated"]["loss"] < on_val["metrics"]["loss"]
    assert f"temperature {written['temperature']['value']:.4f} (fitted to the val split)" in printed


def test_images_without_labels_get_the_probabilities_of_an_evaluation(
    evaluate_here: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.report.loose_images.plot_samples", lambda *_: None)
    rows = digits(tmp_path / "all", run, ("3", "5", "7"))
    evaluate_here()
    whole = pq.read_table(run / "predictions_test.parquet").to_pydict()
    printed = evaluate_here("--images", str(tmp_path / "all" / "test"))
    found = pq.read_table(run / "predictions_images.parquet").to_pydict()
    assert set(found["image"]) == set(rows) and len(found["image"]) > 100
    for image, prediction, probabilities in zip(
        found["image"], found["prediction"], found["probabilities"], strict=True
    ):
        assert probabilities == pytest.approx(whole["probabilities"][rows[image]], abs=1e-6)
        assert prediction == whole["prediction"][rows[image]]
    assert f"and {len(rows) - 100} more" in printed
    warm = evaluate_here("--images", str(tmp_path / "all" / "test" / "3"), "--temperature=100")
    shares = [float(part.split()[1].rstrip("%")) for part in warm.splitlines()[1].split("  ")[1].split(", ")]
    assert shares == pytest.approx([10, 10, 10], abs=1)


def test_odd_files_are_predicted_or_told(evaluate_here: Any, run: Path, tmp_path: Path) -> None:
    good = write_odd_images(tmp_path / "odd")
    printed = evaluate_here("--images", str(tmp_path / "odd"))
    with (run / "predictions_images.csv").open(newline="") as file:
        table = {row["image"]: row for row in csv.DictReader(file)}
    assert table.keys() == good | BROKEN
    for name, row in table.items():
        assert bool(row["problem"]) is (name in BROKEN)
        shares = [float(row[f"probability_{rank}"]) for rank in range(1, 6)] if name in good else []
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1
    assert len([line for line in printed.splitlines() if line.startswith("left out: ")]) == len(BROKEN)
    assert len(notes_of(printed)) == 1 and "Traceback" not in printed
    with Image.open(run / "figures" / "images.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    with pytest.raises(UserError, match="none of 1 files is an image"):
        evaluate_here("--images", str(tmp_path / "odd" / "text.jpg"))
