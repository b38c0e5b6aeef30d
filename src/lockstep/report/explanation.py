"""The pictures of what a trained network sees: where it looks, its kernels, the maps of its layers, its features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lockstep.report.canvas import FAINT, INK, LONGEST_NAME, Tiles, draw_image, new_figure, save, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEAT = "viridis"  # rises in lightness alone: read by the colour-blind, and in grey
_SIGNED = "PuOr"
_LONGEST_TITLE = 17
_COLORS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd", "#4a8f3c",
)  # fmt: skip
"""Nine of Petroff's ten, for colour-blind readers (arXiv:2107.02270), and a green for his grey, which is the rest's"""
MOST_COLORS = len(_COLORS)


@dataclass(frozen=True, eq=False)
class Explained:
    """An image, and where the network looked for a class."""

    pixels: np.ndarray
    """uint8 (H, W, C)"""
    label: str
    prediction: str
    confidence: float
    for_prediction: np.ndarray
    """Heat (h, w) in [0, 1], h and w those of the layer"""
    for_label: np.ndarray

    @property
    def is_right(self) -> bool:
        """Whether the two are one class."""
        return self.label == self.prediction


def plot_grad_cam(shown: Sequence[Explained], layer: str, path: Path) -> "Figure":
    """Right and wrong images, a column each, above the same under the heat for the prediction, and for the label."""
    bands = [[one for one in shown if one.is_right is right] for right in (True, False)]
    rows = [2 * bool(bands[0]), 3 * bool(bands[1])]
    columns, tall = max(map(len, bands)), shown[0].pixels.shape[0] / shown[0].pixels.shape[1]
    tiles = Tiles(columns, sum(rows), tall, room=0.19, gap=0.06)
    figure = new_figure(2.6 + columns * 1.45, 0.6 + sum(rows) * 1.37 * (tall + 0.25))
    axes = figure.subplots()
    for first, band in zip((0, rows[0]), bands, strict=True):
        for column, one in enumerate(band):
            _draw_explained(axes, one, tiles, first, column)
    kinds = ["right", "for the prediction"][: rows[0]] + ["wrong", "for the prediction", "for the label"][: rows[1]]
    axes.set_yticks([tiles.centre(row, 0)[1] for row in range(sum(rows))], kinds, fontsize=10, color=INK)
    axes.tick_params(length=0)
    axes.set(xlim=tiles.xlim, ylim=tiles.ylim)
    axes.set_title(f"Grad-CAM of {shorten(layer, 40)}", loc="left", fontsize=12, fontweight="bold", color=INK, pad=8)
    _add_scale(axes, "share of the image's highest")
    return save(figure, path)


def _draw_explained(axes: "Axes", one: Explained, tiles: Tiles, first: int, column: int) -> None:
    titles = [one.label, f"{shorten(one.prediction, _LONGEST_TITLE - 5)} {one.confidence:.0%}", one.label]
    grey = one.pixels.mean(2, keepdims=True).astype(np.uint8)
    heats = [None, one.for_prediction, *([] if one.is_right else [one.for_label])]
    for row, (title, heat) in enumerate(zip(titles, heats, strict=False), start=first):
        place = tiles.extent(row, column)
        draw_image(axes, one.pixels if heat is None else grey, extent=place)
        if heat is not None:
            axes.imshow(heat, cmap=_HEAT, vmin=0, vmax=1, alpha=0.55, interpolation="bilinear", extent=place)
        axes.text(place[0], place[3] + 0.03, shorten(title, _LONGEST_TITLE), fontsize=8.5, color=INK)


def plot_kernels(name: str, weight: np.ndarray, path: Path) -> "Figure":
    """Kernels of a layer, (outputs, inputs, h, w): those of images as one picture each, others as a table of slices.

    At most 64 kernels of images; of others 12 outputs, a row each, and 16 inputs.
    """
    outputs, inputs, height, width = weight.shape
    largest = float(np.abs(weight).max()) or 1.0
    if inputs in (1, 3):
        shown = weight[:64].transpose(0, 2, 3, 1)
        columns = min(len(shown), 16)
        told = f"{len(shown)} of {outputs} kernels" if outputs > len(shown) else f"{outputs} kernels"
    else:
        shown = weight[:12, :16].reshape(-1, height, width, 1)
        columns = min(inputs, 16)
        told = f"{min(outputs, 12)} of {outputs} kernels, a row each, over {columns} of {inputs} channels"
    rows = -(-len(shown) // columns)
    tiles = Tiles(columns, rows, height / width, gap=0.1)
    figure = new_figure(max(1.5 + columns * 0.6, 6.0), 0.7 + rows * 0.6 * (height / width + 0.1))
    axes = figure.subplots()
    draw_image(axes, np.zeros((1, 1, 1), np.uint8), extent=(0, 1e-3, -1e-3, 0))
    for index, kernel in enumerate(shown):
        place = tiles.extent(*divmod(index, columns))
        if kernel.shape[2] == 3:
            axes.imshow(0.5 + kernel / (2 * largest), interpolation="nearest", extent=place)
        else:
            axes.imshow(kernel[:, :, 0], cmap=_SIGNED, vmin=-largest, vmax=largest, extent=place)
    axes.set(xlim=tiles.xlim, ylim=tiles.ylim, xticks=[], yticks=[])
    title = f"{shorten(name, 40)}: {told}, {height} x {width}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    if inputs == 3:
        axes.set_xlabel("red, green and blue weights; grey is 0", color=INK, fontsize=9)
    else:
        _add_scale(axes, "weight", _SIGNED, largest)
    return save(figure, path)


def _add_scale(axes: "Axes", label: str, colours: str = _HEAT, largest: float | None = None) -> None:
    """A bar as tall as the axes: from 0 to 1, or on both sides of 0."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = (0.0, 1.0) if largest is None else (-largest, largest)
    figure, place = axes.get_figure(), axes.inset_axes((1.012, 0.0, 0.012, 1.0))
    assert figure is not None
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colours), cax=place)
    bar.set_label(label, color=INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=INK, labelsize=8)


@dataclass(frozen=True, eq=False)
class Maps:
    """What a layer makes of an image: its channels of the highest mean, (K, h, w), of so many."""

    layer: str
    image: int
    """Its number among those shown"""
    values: np.ndarray
    channels: int


def plot_feature_maps(images: np.ndarray, maps: Sequence[Maps], path: Path) -> "Figure":
    """A row per layer and image: the image, uint8 (H, W, C), and the layer's maps of it, each by its own range."""
    columns, tall = 1 + max(len(one.values) for one in maps), images.shape[1] / images.shape[2]
    tiles = Tiles(columns, len(maps), tall, gap=0.06)
    figure = new_figure(3.0 + columns * 0.95, 0.75 + len(maps) * 0.95 * (tall + 0.06))
    axes = figure.subplots()
    names = []
    for row, one in enumerate(maps):
        if row == 0 or maps[row - 1].image != one.image:
            draw_image(axes, images[one.image], extent=tiles.extent(row, 0))
        for column, values in enumerate(one.values, start=1):
            axes.imshow(values, cmap=_HEAT, interpolation="nearest", extent=tiles.extent(row, column))
        _, height, width = one.values.shape
        names.append(f"{shorten(one.layer, 24)}\n{one.channels} of {height} x {width}")
    axes.set_yticks([tiles.centre(row, 0)[1] for row in range(len(maps))], names, fontsize=9, color=INK)
    axes.tick_params(length=0)
    axes.set(xlim=tiles.xlim, ylim=tiles.ylim, xticks=[])
    title = "Feature maps: channels of the highest mean, each from its lowest value (dark) to its highest"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    return save(figure, path)


def tsne(features: np.ndarray) -> np.ndarray:
    """Points (N, 2) of features (N, F), N >= 10: t-SNE of their first 50 principal components, the same each time.

    Van der Maaten and Hinton, Visualizing Data using t-SNE, 2008; perplexity 30, for fewer than 91 points a third.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    components = min(50, *features.shape)
    reduced = PCA(components, svd_solver="full", random_state=0).fit_transform(features)
    perplexity = min(30.0, (len(features) - 1) / 3)
    with threadpool_limits(1):  # its sums depend on the number of threads, which wait for each other on a busy machine
        return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)


def plot_embedding(
    points: np.ndarray, labels: np.ndarray, is_right: np.ndarray, named: dict[int, str], path: Path
) -> "Figure":
    """Points (N, 2) of features by the class they belong to, (N,): the named ones in colours, others faint.

    A wrong prediction, by `is_right` (N,), is a cross. Each name stands at the median of its class, or, where others
    are faint, beside the map: those that are named because they are confused lie in one place.
    """
    figure = new_figure(8.4, 7.2)
    axes = figure.subplots()
    others = ~np.isin(labels, list(named))
    axes.scatter(points[others, 0], points[others, 1], s=7, color="#d5d5d5", linewidths=0)
    for color, (number, name) in zip(_COLORS, named.items(), strict=False):
        own = labels == number
        if not own.any():
            continue
        (x, y), (wrong_x, wrong_y) = points[own & is_right].T, points[own & ~is_right].T
        axes.scatter(x, y, s=13, color=color, linewidths=0, alpha=0.8, label=shorten(name, LONGEST_NAME))
        axes.scatter(wrong_x, wrong_y, s=26, color=color, marker="x", linewidths=1.2)
        if not others.any():
            _write_name(axes, points[own], name)
    title = f"Features of {len(points):,} images by t-SNE: {int((~is_right).sum()):,} wrong ones are crosses"
    if others.any():
        title += f"\nin colours the {len(named)} classes of the most mistakes, the others grey"
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, labelcolor=INK, markerscale=1.8)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=8)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(FAINT)
    return save(figure, path)


def _write_name(axes: "Axes", points: np.ndarray, name: str) -> None:
    from matplotlib.patheffects import withStroke

    x, y = np.median(points, axis=0)
    text = axes.text(x, y, shorten(name, LONGEST_NAME), fontsize=11, fontweight="bold", color=INK)
    text.set(ha="center", va="center", path_effects=[withStroke(linewidth=3.5, foreground="white")])
