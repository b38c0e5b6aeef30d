"""A trained network for others to use: `lockstep export RUN --to safetensors|torch_export|onnx|hub-folder`.

The best weights (the average, where there is one), with preprocessing.json (size, crop, normalisation, class names) and
a model card, README.md, in RUN/export/<form>/. torch_export and onnx take float images (N, C, H, W) in [0, 1], any
number, and normalise them inside. hub-folder is laid out as timm's repositories are, and
timm.create_model("local-dir:FOLDER", pretrained=True) loads it where the network is timm's.

What was written is loaded again and compared with the network on test images: if a probability differs by more than
--tolerance, nothing is left.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lockstep.augment.transform import build_transform
from lockstep.data.images import Data, build_data
from lockstep.data.loader import evaluation_batch
from lockstep.data.sources.source import Identity, spread
from lockstep.errors import UsageError, UserError, print_line
from lockstep.export.card import Facts, write_card
from lockstep.export.classifier import Classifier
from lockstep.export.formats import FORMATS, Outputs, require_packages, write_export
from lockstep.export.hub import push, require_token
from lockstep.export.preprocessing import PREPROCESSING, build_preprocessing
from lockstep.models.network import load_network
from lockstep.report.predictions import class_names
from lockstep.run.digest import digest_of_checkpoint
from lockstep.run.folder import difference_of_data
from lockstep.settings.cli import find_weights
from lockstep.settings.config import Config
from lockstep.settings.yaml import load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run, and say how the file compares with the network, and where it is."""
    options = _parser().parse_args(arguments)
    if options.images < 1:
        raise UsageError(f"--images={options.images} must be at least 1: what is not compared is not exported")
    checkpoint = find_weights(options.run, options.checkpoint)
    require_packages(options.to)
    if options.push_to_hub:
        require_token(options.push_to_hub)
    output = options.output or options.run / "export" / options.to
    with _filled_aside(output, options.to) as folder:
        _export(options, checkpoint, folder)
    print_line(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    if options.push_to_hub:
        print_line(push(output, options.push_to_hub))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, runs/NAME")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a path")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/export/<form>")
    parser.add_argument("--images", type=int, default=1000, help="test images to compare on, at most (default: 1000)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of probabilities (default: 0.0001)")
    parser.add_argument(
        "--push-to-hub", metavar="USER/NAME", help="upload the folder, into a private repository if new"
    )
    return parser


@contextmanager
def _filled_aside(output: Path, form: str) -> Iterator[Path]:
    """A folder beside `output`, whose files go there when all is well, and nowhere else.

    Raises UserError if files of others lie in `output`, or an export of another form, which card and preprocessing.json
    would no longer describe.
    """
    output = output.resolve()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file: name a folder")
    if output.exists() and any(output.iterdir()) and not (output / PREPROCESSING).is_file():
        raise UserError(f"--output={output} holds other files: name an empty or a new folder")
    of_forms = {name for known in FORMATS.values() for name in known.files} - set(FORMATS[form].files)
    if found := sorted(name for name in of_forms if (output / name).exists()):
        raise UserError(f"--output={output} holds another form's {' and '.join(found)}: name another folder")
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        yield aside
        output.mkdir(exist_ok=True)
        for path in aside.iterdir():
            os.replace(path, output / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _export(options: argparse.Namespace, checkpoint: Path, folder: Path) -> None:
    config = load_config(options.run / "config.yaml")

    def accept(identity: Identity) -> None:
        difference_of_data(options.run, config, identity)

    data = build_data(config, options.run, write=False, accept=accept)
    network = load_network(config.model, data.image_shape, data.num_classes, checkpoint)
    preprocessing = build_preprocessing(config.augment, data, class_names(data))
    write_export(options.to, Classifier(network, preprocessing), config.model, folder)
    read = FORMATS[options.to].read(folder)
    comparison = compare(network, read, config, data, images=options.images, tolerance=options.tolerance)
    print_line(comparison)
    digest = digest_of_checkpoint(checkpoint, network)
    write_card(folder, Facts(options.run, checkpoint, config, data, preprocessing, options.to, comparison, digest))


@torch.no_grad()
def compare(network: nn.Module, exported: Outputs, config: Config, data: Data, *, images: int, tolerance: float) -> str:
    """How an exported network compares with the one it was made from, on test images spread over the set, in words.

    The network is evaluated as `eval.py` does it, in fp32 on the CPU. Raises UserError if a probability differs by more
    than the tolerance.
    """
    transform = build_transform(config, data.mean, data.std, data.num_classes, precropped=False)
    transform, network = replace(transform, dtype=torch.float32), network.eval()
    largest, changed, seen = 0.0, 0, 0
    for chosen in torch.tensor(spread(len(data.test), images)).split(evaluation_batch(data.image_shape)):
        loaded = [image for index in chosen.tolist() if (image := data.test.load(index)) is not None]
        if not loaded:
            continue
        batch = torch.stack(loaded)
        expected = transform.logits(network, batch).softmax(1)
        found = exported(batch.permute(0, 3, 1, 2).float() / 255).softmax(1)
        largest = float(np.maximum(largest, float((found - expected).abs().max())))  # which keeps a NaN
        changed += int((found.argmax(1) != expected.argmax(1)).sum())
        seen += len(batch)
    if not seen:
        raise UserError("no test image can be read, and what is not compared is not exported")
    told = (
        f"compared with the network on {seen} test images: probabilities differ by at most {largest:.2g}, "
        f"{changed} predictions changed"
    )
    if not largest <= tolerance:
        raise UserError(f"{told}; --tolerance={tolerance:g} allows no more: nothing was exported")
    return told[0].upper() + told[1:]
