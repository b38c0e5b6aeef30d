import math
from pathlib import Path

import numpy as np
import pytest
from folders import finished, lines, write_run
from PIL import Image

from lockstep.report.comparison import Group, group_runs, read_runs
from lockstep.report.figures import (
    plot_comparison,
    plot_confusion_matrix,
    plot_curves,
    plot_distances,
    plot_gallery,
    plot_samples,
)


def history(epochs: int = 4, steps_per_epoch: int = 100) -> list[dict]:
    records: list[dict] = []
    for step in range(25, epochs * steps_per_epoch + 1, 25):
        epoch = math.ceil(step / steps_per_epoch)
        train = {"loss": 2 / step, "accuracy": 1 - 1 / step, "lr": 1e-3 / step}
        records.append({"step": step, "epoch": epoch, "split": "train", **train})
        if step % steps_per_epoch == 0:
            records.append({"step": step, "epoch": epoch, "split": "val", "loss": 3 / step, "accuracy": 1 - 2 / step})
    return records


def png(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == [path.name], "a temporary file was left behind"
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return (load_digits().images[:30, :, :, None] * 15).astype(np.uint8)


def drawn_at(figure, pixels: np.ndarray, corner: tuple[float, float], shape: tuple[int, ...]) -> np.ndarray:
    """What is drawn in the middle of each pixel of an image of this shape, 1 wide, whose upper left corner is there."""
    (axes,), (height, width, _) = figure.axes, shape
    x = corner[0] + (np.arange(width) + 0.5) / width
    y = corner[1] - (np.arange(height) + 0.5) / width
    places = axes.transData.transform(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)).astype(int)
    return pixels[len(pixels) - 1 - places[:, 1], places[:, 0], 0].reshape(height, width)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_curves_have_three_panels_over_fractional_epochs(tmp_path: Path) -> None:
    records = [*history(), {"step": 400, "best_step": 300, "split": "test", "loss": 0.123, "accuracy": 0.961}]
    figure = plot_curves(records, tmp_path / "curves.png")
    assert png(tmp_path / "curves.png").shape == (570, 1800, 3)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Accuracy", "Learning rate"]
    loss, accuracy, lr = figure.axes
    train, val, test = loss.lines
    assert train.get_xdata()[0] == pytest.approx(0.25) and train.get_xdata()[-1] == pytest.approx(4)
    assert list(val.get_xdata()) == pytest.approx([1, 2, 3, 4])
    assert list(val.get_ydata()) == pytest.approx([0.03, 0.015, 0.01, 0.0075])
    assert (test.get_xdata()[0], test.get_ydata()[0]) == pytest.approx((3, 0.123))
    assert "100 %" in [label.get_text() for label in accuracy.get_yticklabels()]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["train", "val", "test 96.1 %"]
    assert len(lr.lines) == 1 and lr.get_ylim()[0] == 0


def test_curves_of_a_run_that_stopped_within_an_epoch(tmp_path: Path) -> None:
    stopped = {"step": 425, "epoch": 5, "split": "train", "loss": 0.1}
    figure = plot_curves([*history(), stopped], tmp_path / "curves.png")
    assert figure.axes[0].lines[0].get_xdata()[-1] == pytest.approx(4.25)


def test_curves_of_an_empty_or_broken_history(tmp_path: Path) -> None:
    figure = plot_curves([], tmp_path / "curves.png")
    assert [texts(axes) for axes in figure.axes] == [["nothing logged yet"]] * 3
    assert png(tmp_path / "curves.png").shape == (570, 1800, 3)
    lost = [{"step": 5, "epoch": 1, "split": "train", "loss": math.nan, "accuracy": math.inf, "lr": None}]
    figure = plot_curves(lost, tmp_path / "curves.png")
    assert texts(figure.axes[2]) == ["nothing logged yet"]


def test_confusion_matrix_shows_counts_names_and_accuracy(tmp_path: Path) -> None:
    counts = np.array([[1200, 300, 0], [0, 10, 30], [0, 0, 0]])
    figure = plot_confusion_matrix(counts, ["cat", "dog", "sloth"], tmp_path / "matrix.png")
    axes = figure.axes[0]
    assert sorted(texts(axes)) == ["10", "1200", "30", "300"]
    assert axes.get_title(loc="left") == "1,210 of 1,540 right: accuracy 78.6 %"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "sloth"]
    shares = axes.images[0].get_array()
    assert np.allclose(shares, [[0.8, 0.2, 0], [0, 0.25, 0.75], [0, 0, 0]])
    pixels = png(tmp_path / "matrix.png")
    assert pixels.shape == (828, 900, 3) and pixels.std() > 20


@pytest.mark.parametrize(("classes", "counts_shown", "names_shown"), [(25, 25, 25), (26, 0, 26), (100, 0, 50)])
def test_confusion_matrix_of_many_classes(classes: int, counts_shown: int, names_shown: int, tmp_path: Path) -> None:
    names = [f"a very long class name {index}" for index in range(classes)]
    figure = plot_confusion_matrix(7 * np.eye(classes, dtype=int), names, tmp_path / "matrix.png")
    axes = figure.axes[0]
    assert len(axes.texts) == counts_shown
    assert len(axes.get_xticklabels()) == len(axes.get_yticklabels()) == names_shown
    assert max(len(label.get_text()) for label in axes.get_yticklabels()) == 20


def test_of_more_classes_the_most_confused_are_drawn(tmp_path: Path) -> None:
    counts = 10 * np.eye(300, dtype=int)
    counts[200, 7], counts[7, 50], counts[90, 91] = 40, 5, 30
    figure = plot_confusion_matrix(counts, [f"class {index}" for index in range(300)], tmp_path / "matrix.png")
    axes = figure.axes[0]
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert named[:5] == ["class 200", "class 7", "class 90", "class 91", "class 50"] and len(named) == 24
    shares = axes.images[0].get_array()
    assert np.allclose(shares[:2, :2], [[0.2, 0.8], [0, 10 / 15]]), "of all samples of the class"
    assert axes.get_title(loc="left") == (
        "3,000 of 3,075 right: accuracy 97.6 %\nof 300 classes the 24 of the most frequent confusions"
    )


def test_confusion_matrix_refuses_another_number_of_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\) does not fit 2 class names"):
        plot_confusion_matrix(np.eye(3), ["a", "b"], tmp_path / "matrix.png")
    with pytest.raises(ValueError, match="0 class names"):
        plot_confusion_matrix(np.zeros((0, 0)), [], tmp_path / "matrix.png")
    assert not any(tmp_path.iterdir())


def test_empty_confusion_matrix_is_drawn(tmp_path: Path) -> None:
    figure = plot_confusion_matrix(np.zeros((2, 2), int), ["a", "b"], tmp_path / "matrix.png")
    assert figure.axes[0].get_title(loc="left") == "no samples"


def test_samples_grid_marks_wrong_ones(tmp_path: Path) -> None:
    images = digits()[:7]
    wrong = [False, True, False, False, False, False, False]
    figure = plot_samples(images, [f"digit {index}" for index in range(7)], tmp_path / "samples.png", wrong=wrong)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [f"digit {index}" for index in range(7)]
    assert [text.get_color() == "#c0392b" for text in axes.texts] == list(wrong)
    (frame,) = axes.patches
    (left, bottom), tall = frame.get_xy(), frame.get_height()
    assert axes.texts[1].get_position() == (left + 0.5, bottom + tall + 0.03), "above the image in the frame"
    pixels = png(tmp_path / "samples.png").astype(int)
    assert drawn_at(figure, pixels, (left, bottom + tall), images[1].shape).tolist() == images[1, :, :, 0].tolist()
    assert pixels.shape == (888, 765, 3)
    assert ((pixels[..., 0] - pixels[..., 1]) > 100).sum() > 500, "no red frame"


def test_samples_stop_at_25_and_refuse_bad_input(tmp_path: Path) -> None:
    figure = plot_samples(digits(), ["x"] * 30, tmp_path / "samples.png")
    assert len(figure.axes[0].texts) == 25
    with pytest.raises(ValueError, match="no images"):
        plot_samples(digits()[:0], [], tmp_path / "none.png")
    with pytest.raises(ValueError, match="30 images need as many titles"):
        plot_samples(digits(), ["x"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_transforms_gallery_has_a_labelled_row_each(tmp_path: Path) -> None:
    images = np.repeat(digits()[:4], 3, axis=3)
    figure = plot_gallery([("original", images), ("flip", images[:2, :, ::-1])], ["first"], tmp_path / "transforms.png")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["original", "flip"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first"]
    pixels = png(tmp_path / "transforms.png")
    for column in range(4):
        assert (drawn_at(figure, pixels, (1.08 * column, 0), images[0].shape) == images[column, :, :, 0]).all()
        below = drawn_at(figure, pixels, (1.08 * column, -1.08), images[0].shape)
        assert (below == (images[column, :, ::-1, 0] if column < 2 else 255)).all(), "a shorter row ends in paper"
    assert pixels.shape == (480, 1140, 3) and pixels.std() > 20
    with pytest.raises(ValueError, match="no images"):
        plot_gallery([], [], tmp_path / "none.png")


def test_same_input_gives_the_same_file_and_no_global_figure(tmp_path: Path) -> None:
    plot_curves(history(), tmp_path / "a" / "curves.png")
    plot_curves(history(), tmp_path / "b" / "curves.png")
    assert (tmp_path / "a" / "curves.png").read_bytes() == (tmp_path / "b" / "curves.png").read_bytes()
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(OSError):
        plot_curves([], tmp_path / "curves.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_distances_have_a_colour_for_each_program_and_zero_at_the_foot(tmp_path: Path) -> None:
    ours = {"2 processes": [0.0, 0.0], "3 processes": [0.0, 0.0]}
    panels = {"fp32": {"ours": ours, "plain": {"2 processes": [1e-4, 0.5]}}, "bf16": {"ours": ours}}
    figure = plot_distances(panels, (10, 20), tmp_path / "distances.png")
    assert png(tmp_path / "distances.png").shape == (630, 1800, 3)
    left, right = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["fp32", "bf16"]
    assert [line.get_label() for line in left.lines] == ["ours, 2 processes", "ours, 3 processes", "plain, 2 processes"]
    colours = [line.get_color() for line in left.lines]
    assert colours[0] == colours[1] != colours[2] and right.lines[0].get_color() == colours[0]
    assert left.lines[0].get_ydata().tolist() == [1e-9] * 2 and left.get_yticklabels()[0].get_text() == "0"
    assert left.lines[2].get_ydata().tolist() == [1e-4, 0.5]


@pytest.mark.parametrize("name", [r"$\frac$", "$5 bill", "caf\udce9", "100 %"])
def test_any_class_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    """`$` would begin a formula, and bytes that are no UTF-8 have no glyph."""
    plot_confusion_matrix(np.eye(2, dtype=int), [name, "other"], tmp_path / "confusion.png")
    plot_samples(digits()[:2], [name, "other"], tmp_path / "samples.png")
    plot_gallery([(name, digits()[:2])], [], tmp_path / "transforms.png")


def some_groups(folder: Path, number: int, *, lr: float = 0.0) -> list[Group]:
    """Groups of two seeds each."""
    paths = [
        write_run(
            folder / f"{index} {seed}",
            finished(0.5),
            lines([0.1 * index, 0.1 * index + 0.1 * seed], lr=0.1 + lr * index),
            model__width=8 + index,
            run__seed=seed,
        )
        for index in range(number)
        for seed in (0, 1)
    ]
    return group_runs(read_runs(paths))


def test_comparison_draws_a_mean_and_a_band_for_each_group(tmp_path: Path) -> None:
    groups = some_groups(tmp_path / "runs", 2, lr=0.1)
    figure = plot_comparison(groups, tmp_path / "picture" / "comparison.png")
    assert png(tmp_path / "picture" / "comparison.png").shape[1] == 1800
    accuracy, _, _, lr = figure.axes
    assert accuracy.get_title(loc="left") == "Validation accuracy (% of samples)"
    assert [list(line.get_ydata()) for line in accuracy.lines] == [pytest.approx([0, 0.05]), pytest.approx([0.1, 0.15])]
    assert accuracy.collections[0].get_datalim(accuracy.transData).bounds == pytest.approx((1, 0, 1, 0.1))
    assert not lr.collections and [line.get_ydata()[0] for line in lr.lines] == [0.1, 0.2]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["model.width=8 (2 seeds)", "model.width=9 (2 seeds)"]
    assert legend.get_title().get_text() == "Line: mean over seeds; band: lowest to highest"


def test_comparison_of_many_groups_tells_them_apart_and_of_equal_rates_leaves_those_out(tmp_path: Path) -> None:
    figure = plot_comparison(some_groups(tmp_path / "runs", 12), tmp_path / "comparison.png")
    assert len(figure.axes) == 3
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 12


def test_comparison_of_long_trainings_shows_their_last_two_thirds(tmp_path: Path) -> None:
    rising = [0.1, 0.3, 0.5, 0.7, 0.9, 0.92, 0.93, 0.93, 0.94, 0.95, 0.95, 0.96]
    runs = [write_run(tmp_path / "one", None, lines(rising, digests="a" * 12))]
    accuracy = plot_comparison(group_runs(read_runs(runs)), tmp_path / "comparison.png").axes[0]
    assert accuracy.get_ylim() == pytest.approx((0.7 - 0.08 * 0.26, 0.96 + 0.08 * 0.26))
    runs = [write_run(tmp_path / "short", None, lines(rising[:6]))]
    assert plot_comparison(group_runs(read_runs(runs)), tmp_path / "comparison.png").axes[0].get_ylim()[0] < 0.1


def test_comparison_of_rates_that_are_far_apart_is_logarithmic(tmp_path: Path) -> None:
    rates = {0.001: 8, 1.0: 9}
    runs = [
        write_run(tmp_path / f"{lr}", finished(0.9), lines([0.5, 0.6], lr=lr), model__width=w)
        for lr, w in rates.items()
    ]
    lr = plot_comparison(group_runs(read_runs(runs)), tmp_path / "comparison.png").axes[-1]
    assert lr.get_yscale() == "log" and lr.get_ylim() == pytest.approx((1e-5, 1.5))
    near = [
        write_run(tmp_path / f"near {width}", None, lines([0.5], lr=0.1 * width), model__width=width)
        for width in (1, 2)
    ]
    figure = plot_comparison(group_runs(read_runs(near)), tmp_path / "comparison.png")
    assert figure.axes[-1].get_yscale() == "linear"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["model.width=1", "model.width=2"]


def test_comparison_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    groups = group_runs(read_runs([write_run(tmp_path / "begun $\x1b[31m", None, [])]))
    figure = plot_comparison(groups, tmp_path / "comparison.png")
    assert [texts(axes) for axes in figure.axes] == [["nothing logged yet"]] * 3
    with pytest.raises(ValueError, match="no runs to draw"):
        plot_comparison([], tmp_path / "none.png")
