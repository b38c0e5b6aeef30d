"""`lockstep explain`: pictures of a run, and one line where something is not there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lockstep.commands import explain
from lockstep.commands.explain import _examples, _look, _open, _parser, _Seen, _with_more_of, main
from lockstep.data.images import SKIPPED_LABEL, build_data
from lockstep.errors import UsageError, UserError
from lockstep.models.network import build_model
from lockstep.report import explanation
from lockstep.settings.cli import parse_config
from lockstep.settings.yaml import config_to_yaml


@pytest.fixture
def run(tmp_path: Path, cache_dir: Path) -> Path:
    return untrained(tmp_path / "run", cache_dir, "--model.name=tiny_cnn")


def untrained(run: Path, cache_dir: Path, *arguments: str) -> Path:
    config = parse_config([f"--data.cache_dir={cache_dir}", *arguments])
    data = build_data(config, run, write=False)
    torch.manual_seed(0)
    (run / "checkpoints").mkdir(parents=True)
    weights = build_model(config.model, data.image_shape, data.num_classes).state_dict()
    save_file(weights, run / "checkpoints" / "best")
    (run / "config.yaml").write_text(config_to_yaml(config))
    return run


@pytest.fixture
def quick_tsne(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation, "tsne", lambda features: features[:, :2])


@pytest.mark.usefixtures("quick_tsne")
def test_all_pictures_are_drawn_and_in_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--layers", "features.block2.0", "features", "--images", "3"]) == 0
    printed = capsys.readouterr().out
    for name in ("grad_cam", "feature_maps", "filters", "filters_features.block2.0", "embedding"):
        path = run / "figures" / f"{name}.png"
        assert str(path) in printed
        assert Image.open(path).convert("L").getextrema()[0] < 100, "something is drawn"
    assert "Grad-CAM of features.block2.1:" in printed
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "Where the network looks" in page


@pytest.mark.usefixtures("quick_tsne")
def test_a_network_without_maps_has_kernels_as_large_as_images(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = untrained(tmp_path / "mlp", cache_dir, "--model.name=mlp", "--model.dropout=null")
    assert main([str(run), "--split=val"]) == 0
    assert "no layer of this network puts out maps" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["embedding.png", "filters.png"]


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_a_broken_network_has_no_map_of_features(
    factor: float, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanation, "tsne", lambda _: pytest.fail("it dies of them, with equal ones by a signal"))
    best = run / "checkpoints" / "best"
    save_file({name: factor * value for name, value in load_file(best).items() if value.is_floating_point()}, best)
    older = run / "figures" / "embedding.png"
    older.parent.mkdir()
    older.write_bytes(b"of better days")
    assert main([str(run), "--images=1"]) == 0
    assert "features are not finite, or all the same" in capsys.readouterr().out and not older.exists()


def test_wrong_arguments_are_one_line(run: Path) -> None:
    with pytest.raises(UserError, match=r"--layers: the network has no layer features.blok1. Did you mean features.bl"):
        main([str(run), "--layers", "features.blok1"])
    with pytest.raises(UserError, match=r"--cam_layer: the layer head.2 puts out no maps; .*features do"):
        main([str(run), "--cam_layer=head.2"])
    with pytest.raises(UsageError, match="--images=0 must be at least 1"):
        main([str(run), "--images=0"])
    with pytest.raises(UsageError, match="there is no run in"):
        main([str(run.parent)])


def test_predictions_are_those_of_the_network(run: Path) -> None:
    subject = _open(_parser().parse_args([str(run)]))
    seen = _look(subject, [5, 0, 300])
    assert seen.samples.tolist() == [5, 0, 300]
    assert seen.labels.tolist() == subject.images.labels[[5, 0, 300]].tolist()
    _, images = subject.load([300])
    with torch.no_grad():
        probabilities = subject.network(subject.transform.evaluate(images)).softmax(1)[0]
    assert seen.predicted[2] == probabilities.argmax() and seen.confidences[2] == pytest.approx(
        float(probabilities.max())
    )
    assert seen.losses[2] == pytest.approx(-float(probabilities[seen.labels[2]].log()), rel=1e-5)
    assert seen.features.shape == (3, 128)


def test_images_that_are_skipped_are_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _open(_parser().parse_args([str(run)]))
    labels = subject.images.labels.clone()
    labels[:3] = SKIPPED_LABEL
    subject = replace(subject, images=replace(subject.images, labels=labels))
    monkeypatch.setattr(explain, "evaluation_batch", lambda shape: 1)
    assert _look(subject, [0, 5, 1, 7]).samples.tolist() == [5, 7]
    with pytest.raises(UserError, match="none of the images can be read"):
        _look(subject, [0, 1])
    monkeypatch.setattr(explain, "_open", lambda options: subject)
    with pytest.raises(UserError, match="the network has no layer nowhere"):  # the first image alone is no obstacle
        main([str(run), "--cam_layer=nowhere"])


def seen_of(labels: list[int], predicted: list[int], losses: list[float]) -> _Seen:
    rows = np.arange(len(labels))
    return _Seen(
        rows * 10, np.array(labels), np.array(predicted), rows / 10, np.array(losses), np.zeros((len(labels), 2))
    )


def test_examples_are_of_each_class_in_turn_and_the_worst_mistakes() -> None:
    seen = seen_of([0, 0, 1, 2, 1, 2, 2], [0, 0, 1, 2, 0, 0, 0], [0.1, 0.1, 0.1, 0.1, 3.0, 9.0, 4.0])
    assert _examples(seen, 3).tolist() == [0, 2, 3, 5, 6, 4]
    assert _examples(seen, 1).tolist() == [0, 5]


def test_of_many_classes_those_of_the_most_mistakes_are_shown_whole(run: Path) -> None:
    images = _open(_parser().parse_args([str(run)])).images
    seen = seen_of([3, 4, 5, 3], [0, 0, 5, 3], [1.0, 2.0, 0.1, 0.2])
    labels = images.labels[_with_more_of(np.array([3, 4]), seen, images)].tolist()
    of_both = sum(int((images.labels == number).sum()) for number in (3, 4))
    assert sum(label in (3, 4) for label in labels) == of_both and len(labels) == of_both + 1
