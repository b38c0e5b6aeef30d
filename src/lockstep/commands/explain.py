"""Pictures of what a trained network sees: `lockstep explain RUN`.

In RUN/figures/: where it looks (grad_cam.png: the heat of Grad-CAM, over right and wrong images, for the prediction and
the label), what its layers make of images (feature_maps.png), its first kernels (filters.png), and up to 2,000 images
by their features (embedding.png: t-SNE of what the last linear layer is given). RUN/report.html is written anew with
them. Layers have the names of the network's named_modules(), which `--model.summary=true` lists when training begins.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lockstep.augment.transform import Transform, build_transform
from lockstep.data.images import Data, ImageSet, build_data
from lockstep.data.loader import evaluation_batch
from lockstep.data.sources.source import Identity, spread
from lockstep.errors import UsageError, UserError, did_you_mean, print_line
from lockstep.evaluation.activations import as_maps, embed, first_kernels, map_sizes, recorded, unpooled
from lockstep.evaluation.grad_cam import grad_cam, usual_layer
from lockstep.models.network import load_network
from lockstep.report import explanation
from lockstep.report.explanation import MOST_COLORS, Explained, Maps
from lockstep.report.predictions import class_names
from lockstep.report.run_page import write_run_page
from lockstep.run.folder import difference_of_data
from lockstep.settings.cli import find_weights
from lockstep.settings.yaml import load_config

_MOST_POINTS, _LEAST_POINTS = 2000, 10
_PROBES = 16
"""Images of which one must be readable"""
_NONE_READABLE = "none of the images can be read"
_MAPPED_IMAGES, _MAPPED_LAYERS, _CHANNELS = 2, 5, 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw all that the network allows, and say where the pictures are."""
    options = _parser().parse_args(arguments)
    if options.images < 1:
        raise UsageError(f"--images={options.images} must be at least 1")
    subject = _open(options)
    _, images = subject.load(spread(len(subject.images), _PROBES))
    if not len(images):
        raise UserError(_NONE_READABLE)
    sizes = map_sizes(subject.network, subject.transform.evaluate(images[:1]))
    for flag, name in [*(("--layers", name) for name in options.layers), ("--cam_layer", options.cam_layer)]:
        if name is not None:
            _require_maps(subject.network, sizes, flag, name)
    seen = _look(subject, spread(len(subject.images), _MOST_POINTS))
    shown = _examples(seen, options.images)
    if usual := unpooled(subject.network, sizes):
        _draw_grad_cam(subject, seen, shown, options.cam_layer or usual_layer(subject.network, usual))
        last_of_sizes = list({sizes[name]: name for name in usual}.values())
        _draw_feature_maps(subject, seen, shown, options.layers or last_of_sizes[-_MAPPED_LAYERS:])
    else:
        print_line("no Grad-CAM and no feature maps: no layer of this network puts out maps")
    _draw_kernels(subject, options.layers)
    _draw_embedding(subject, seen)
    print_line(str(write_run_page(options.run)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep explain", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, runs/NAME")
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a path")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--images", type=int, default=8, help="for Grad-CAM: so many right and wrong ones (default: 8)")
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="NAME", help="for maps and kernels (default: the last of each size)"
    )
    parser.add_argument("--cam_layer", metavar="NAME", help="for Grad-CAM (default: the last that puts out maps)")
    return parser


@dataclass(frozen=True, eq=False)
class _Subject:
    """What is looked at."""

    network: nn.Module
    """In evaluation mode"""
    transform: Transform
    data: Data
    images: ImageSet
    figures: Path

    def load(self, samples: Sequence[int]) -> tuple[list[int], Tensor]:
        """Of these samples those that can be read, and their images, uint8 (N, H, W, C)."""
        loaded = {sample: image for sample in samples if (image := self.images.load(sample)) is not None}
        channels, height, width = self.images.shape
        none = torch.empty(0, height, width, channels, dtype=torch.uint8)
        images = torch.stack(list(loaded.values())) if loaded else none
        return list(loaded), images.to(next(self.network.parameters()).device)


def _open(options: argparse.Namespace) -> _Subject:
    checkpoint = find_weights(options.run, options.checkpoint)
    config = load_config(options.run / "config.yaml")

    def accept(identity: Identity) -> None:
        difference_of_data(options.run, config, identity)

    data = build_data(config, options.run, write=False, accept=accept)
    images = {"train": data.train, "val": data.val, "test": data.test}[options.split]
    if images is None:
        raise UserError(f"this run has no {options.split} split (data.val_fraction=0)")
    network = load_network(config.model, data.image_shape, data.num_classes, checkpoint).eval()
    network = network.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, config.runtime.dtype))
    transform = build_transform(config, data.mean, data.std, data.num_classes, precropped=False)
    return _Subject(network, transform, data, images, options.run / "figures")


def _require_maps(network: nn.Module, sizes: dict[str, tuple[int, int]], flag: str, name: str) -> None:
    if name in sizes:
        return
    names = [known for known, _ in network.named_modules() if known]
    if name in names:
        raise UserError(f"{flag}: the layer {name} puts out no maps; {', '.join(list(sizes)[-3:]) or 'none'} do")
    raise UserError(f"{flag}: the network has no layer {name}.{did_you_mean(name, names)}")


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the network makes of some images: (N,) each, but for the features, (N, F)."""

    samples: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidences: np.ndarray
    losses: np.ndarray
    features: np.ndarray

    @property
    def is_right(self) -> np.ndarray:
        return self.labels == self.predicted


def _look(subject: _Subject, samples: Sequence[int]) -> _Seen:
    """Those that can be read, in their order; UserError if none can."""
    parts = []
    for chosen in torch.tensor(samples).split(evaluation_batch(subject.images.shape)):
        kept, images = subject.load(chosen.tolist())
        if not kept:
            continue
        logits, features = embed(subject.network, subject.transform.evaluate(images))
        log_probabilities, labels = logits.cpu().double().log_softmax(1), subject.images.labels[kept]
        best, predicted = log_probabilities.max(1)
        losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
        parts.append((torch.tensor(kept), labels, predicted, best.exp(), losses, features.cpu().double()))
    if not parts:
        raise UserError(_NONE_READABLE)
    return _Seen(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def _examples(seen: _Seen, most: int) -> np.ndarray:
    """Rows of right predictions, of each class in turn, and of the worst mistakes, at most so many of each."""
    right, wrong = np.flatnonzero(seen.is_right), np.flatnonzero(~seen.is_right)
    labels = seen.labels[right]
    turns = [int((labels[:place] == label).sum()) for place, label in enumerate(labels)]
    in_turn = right[np.argsort(turns, kind="stable")]
    return np.concatenate([in_turn[:most], wrong[np.argsort(-seen.losses[wrong], kind="stable")][:most]])


def _draw_grad_cam(subject: _Subject, seen: _Seen, shown: np.ndarray, layer: str) -> None:
    _, pixels = subject.load(seen.samples[shown].tolist())
    images, names = subject.transform.evaluate(pixels), class_names(subject.data)
    classes = [torch.from_numpy(of[shown]).to(images.device) for of in (seen.predicted, seen.labels)]
    heats = [grad_cam(subject.network, layer, images, chosen).cpu().numpy() for chosen in classes]
    explained = [
        Explained(
            pixels[place].cpu().numpy(),
            names[seen.labels[row]],
            names[seen.predicted[row]],
            float(seen.confidences[row]),
            *(heat[place] for heat in heats),
        )
        for place, row in enumerate(shown)
    ]
    path = subject.figures / "grad_cam.png"
    explanation.plot_grad_cam(explained, layer, path)
    print_line(f"Grad-CAM of {layer}: {path}")


def _draw_feature_maps(subject: _Subject, seen: _Seen, shown: np.ndarray, layers: Sequence[str]) -> None:
    _, pixels = subject.load(seen.samples[shown[:_MAPPED_IMAGES]].tolist())
    with torch.no_grad(), recorded(subject.network, layers) as outputs:
        subject.network(subject.transform.evaluate(pixels))
    rows = []
    for number in range(len(pixels)):
        for name in layers:
            maps = as_maps(subject.network, subject.network.get_submodule(name), outputs[name])
            assert maps is not None, name
            strongest = maps.mean((0, 2, 3)).argsort(descending=True)[:_CHANNELS]  # the same ones of each image
            rows.append(Maps(name, number, maps[number, strongest].float().cpu().numpy(), maps.shape[1]))
    path = subject.figures / "feature_maps.png"
    explanation.plot_feature_maps(pixels.cpu().numpy(), rows, path)
    print_line(f"feature maps of {', '.join(layers)}: {path}")


def _draw_kernels(subject: _Subject, layers: Sequence[str]) -> None:
    """Of the first layer, and of those that are named and have kernels."""
    first = first_kernels(subject.network, subject.data.image_shape)
    named = {name: getattr(subject.network.get_submodule(name), "weight", None) for name in layers}
    kernels = {"filters.png": first} | {f"filters_{name}.png": (name, weight) for name, weight in named.items()}
    for file, found in kernels.items():
        if found is not None and found[1] is not None and found[1].ndim == 4:
            path = subject.figures / file
            explanation.plot_kernels(found[0], found[1].detach().float().cpu().numpy(), path)
            print_line(f"kernels of {found[0]}: {path}")


def _draw_embedding(subject: _Subject, seen: _Seen) -> None:
    path = subject.figures / "embedding.png"
    path.unlink(missing_ok=True)  # of another checkpoint or split
    names = class_names(subject.data)
    chosen = np.flatnonzero(np.bincount(seen.labels, minlength=len(names)))
    if len(chosen) > MOST_COLORS:
        mistakes = np.bincount(seen.labels, seen.losses * ~seen.is_right, minlength=len(names))
        chosen = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_COLORS])
        seen = _look(subject, _with_more_of(chosen, seen, subject.images))
    if len(seen.labels) < _LEAST_POINTS:
        return
    if not np.isfinite(seen.features).all() or not np.ptp(seen.features, axis=0).any():
        print_line("no map of the images: their features are not finite, or all the same")  # where t-SNE may crash
        return
    points = explanation.tsne(seen.features)
    explanation.plot_embedding(points, seen.labels, seen.is_right, {int(c): names[c] for c in chosen}, path)
    print_line(f"features of {len(points):,} images: {path}")


def _with_more_of(classes: np.ndarray, seen: _Seen, images: ImageSet) -> list[int]:
    """Samples: up to 100 of each of these classes, and, of the others, enough of those that were seen."""
    own = [np.flatnonzero(images.labels.numpy() == number)[: _MOST_POINTS // (2 * MOST_COLORS)] for number in classes]
    others = seen.samples[~np.isin(seen.labels, classes)]
    wanted = np.concatenate(own)
    others = others[spread(len(others), _MOST_POINTS - len(wanted))]
    return np.sort(np.concatenate([wanted, others])).tolist()
