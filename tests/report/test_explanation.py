"""Pictures of what a network sees: sizes, and what is written into them."""

from pathlib import Path

import numpy as np
import pytest

from lockstep.report.explanation import Explained, plot_embedding, plot_grad_cam, plot_kernels, tsne


def explained(label: str, prediction: str) -> Explained:
    heat = np.linspace(0, 1, 12).reshape(3, 4)
    return Explained(np.full((8, 10, 3), 90, np.uint8), label, prediction, 0.814, heat, heat)


def texts(figure: object) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]  # type: ignore[attr-defined]


def test_each_image_says_what_it_is_and_was_taken_for(tmp_path: Path) -> None:
    shown = [explained("cat", "cat"), explained("a dog of a long name", "cat")]
    figure = plot_grad_cam(shown, "layer4", tmp_path / "a.png")
    assert texts(figure) == ["cat", "cat 81%", "a dog of a lon...", "cat 81%", "a dog of a lon..."]
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["right", "for the prediction", "wrong", "for the prediction", "for the label"]
    assert len(plot_grad_cam(shown[:1], "layer4", tmp_path / "b.png").axes[0].get_yticklabels()) == 2


def test_kernels_say_how_many_are_left_out(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for shape, told in {
        (96, 3, 7, 7): "conv: 64 of 96 kernels, 7 x 7",
        (6, 1, 3, 5): "conv: 6 kernels, 3 x 5",
        (64, 32, 1, 1): "conv: 12 of 64 kernels, a row each, over 16 of 32 channels, 1 x 1",
    }.items():
        figure = plot_kernels("conv", random.normal(size=shape), tmp_path / "kernels.png")
        assert figure.axes[0].get_title(loc="left") == told


def test_only_named_classes_have_colours(tmp_path: Path) -> None:
    points, labels = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 4
    axes = plot_embedding(points, labels, labels > 0, {0: "zero", 2: "$two"}, tmp_path / "a.png").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["zero", r"\$two"] and not axes.texts
    assert axes.get_title(loc="left").splitlines() == [
        "Features of 40 images by t-SNE: 10 wrong ones are crosses",
        "in colours the 2 classes of the most mistakes, the others grey",
    ]
    assert [len(dots.get_offsets()) for dots in axes.collections] == [20, 0, 10, 10, 0]
    named = {number: f"class {number}" for number in range(4)}
    figure = plot_embedding(points, labels, labels > 0, named, tmp_path / "a.png")
    assert texts(figure) == list(named.values()) and figure.axes[0].get_legend() is None


@pytest.mark.slow
def test_points_are_the_same_each_time_and_keep_groups_together() -> None:
    random = np.random.default_rng(0)
    features = np.repeat(np.eye(5) * 9, 12, axis=0) + random.normal(size=(60, 5))
    points = tsne(features)
    assert points.shape == (60, 2) and np.array_equal(points, tsne(features))
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.eye(60) * 1e9
    assert (distances.argmin(1) // 12 == np.arange(60) // 12).mean() > 0.9
