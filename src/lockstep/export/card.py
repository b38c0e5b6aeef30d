"""The model card, README.md beside an exported network: what it is, what it can, what it cannot, how to run it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.data.images import Data
from lockstep.export.formats import FORMATS
from lockstep.export.hub_folder import is_for_timm
from lockstep.export.preprocessing import Preprocessing
from lockstep.files import checksum, path_of, replace_file
from lockstep.run.folder import read_summary
from lockstep.run.history import read_starts
from lockstep.settings.config import Config, shaping_settings

CARD = "README.md"
_MOST_CLASSES = 200
_PLACES = ("model.checkpoint", "run.from_run")
"""Settings that name files of one machine"""


@dataclass(frozen=True, eq=False)
class Facts:
    """What a card is written from."""

    run_dir: Path
    checkpoint: Path
    config: Config
    data: Data
    preprocessing: Preprocessing
    form: str
    """A name of FORMATS"""
    comparison: str
    """How the exported file was compared with the network, in words"""
    digest: str | None
    """That of the checkpoint, as metrics.jsonl has it"""

    @property
    def source(self) -> str:
        """The data, without where they lie on this machine."""
        return source_name(self.config.data.source)


def write_card(folder: Path, facts: Facts) -> None:
    """Write README.md for the files that lie in `folder`."""
    head = [f"library_name: {'timm' if _for_timm(folder, facts) else 'lockstep'}", "pipeline_tag: image-classification"]
    parts = [
        "\n".join(["---", "# license: CHOOSE ONE", *head, "tags: [image-classification, lockstep]", "---"]),
        f"# {facts.run_dir.name}",
        _summary(facts),
        "## Use\n\n" + _use(folder, facts),
        "## Results\n\n" + _results(facts),
        "## Intended use and limits\n\n" + "\n".join(f"- {line}" for line in _limits(facts)),
        "## Training\n\n" + _training(facts),
        "## Files\n\n" + _files(folder, facts),
        "## Licence\n\n**Not chosen yet.** Whoever publishes this chooses one that the training images allow, here and "
        "in the first lines of this file.",
    ]
    replace_file(folder / CARD, ("\n\n".join(parts) + "\n").encode())


def snippet(folder: Path, facts: Facts) -> str:
    """Python that prints the class of `image.png`, run in the folder."""
    if _for_timm(folder, facts):
        return _TIMM.format(mode=facts.preprocessing.mode)
    if not FORMATS[facts.form].normalises:
        return _LOCKSTEP
    read = _PILLOW_RESIZED if facts.preprocessing.resize_shorter_side else _PILLOW
    library = "onnxruntime" if facts.form == "onnx" else "torch"
    return _JSON.format(library=library) + read + _PIXELS + _LOGITS[facts.form] + _ANSWER


_LOCKSTEP = """\
from lockstep.export.classifier import load_exported
print(load_exported(".").classify("image.png"))  # the probability of each class, likeliest first
"""
_TIMM = """\
import timm
from PIL import Image
network = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
logits = network(transform(Image.open("image.png").convert("{mode}"))[None])
print(network.pretrained_cfg["label_names"][logits.argmax()])
"""
_JSON = """\
import json, numpy, {library}
from PIL import Image
about = json.load(open("preprocessing.json"))
width, height = about["width"], about["height"]
"""
_PILLOW = """\
image = Image.open("image.png").convert(about["mode"])  # which must be of that width and height
"""
_PILLOW_RESIZED = """\
image = Image.open("image.png").convert(about["mode"])
scale = about["resize_shorter_side"] / min(image.size)
image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
left, top = (image.width - width) // 2, (image.height - height) // 2
image = image.crop((left, top, left + width, top + height))
"""
_PIXELS = """\
pixels = numpy.asarray(image, "float32").reshape(1, height, width, -1).transpose(0, 3, 1, 2) / 255
"""
_LOGITS = {
    "onnx": 'logits = onnxruntime.InferenceSession("model.onnx").run(None, {"images": pixels})[0]\n',
    "torch_export": 'logits = torch.export.load("model.pt2").module()(torch.from_numpy(pixels))\n',
}
_ANSWER = 'print(about["classes"][logits.argmax()])\n'


def _for_timm(folder: Path, facts: Facts) -> bool:
    return facts.form == "hub-folder" and is_for_timm(folder)


def source_name(source: str) -> str:
    """A data source as others may know it: of a folder, or shards, on this machine, its own name alone."""
    kind, _, name = source.partition(":")
    return f"{kind}:{path_of(name).resolve().name}" if kind == "tar" or path_of(name).exists() else source


def _summary(facts: Facts) -> str:
    channels, height, width = facts.preprocessing.shape
    kind = "grey" if channels == 1 else "colour"
    return (
        f"`{facts.config.model.name}`, trained on {facts.source}: {kind} images of {height}x{width} pixels "
        f"to one of {len(facts.preprocessing.classes)} classes."
    )


def _use(folder: Path, facts: Facts) -> str:
    takes = (
        "The file takes float images (N, C, H, W) in [0, 1], any number N, and normalises them itself; it gives logits."
        if FORMATS[facts.form].normalises
        else "The weights are those of the network alone: images in [0, 1] are normalised with `mean` and `std` first."
    )
    return (
        f"```python\n{snippet(folder, facts)}```\n\n{takes} Resizing, cropping and class names: `preprocessing.json`."
    )


def _results(facts: Facts) -> str:
    summary = read_summary(facts.run_dir)
    best = facts.run_dir / "checkpoints" / "best"
    if "test_accuracy" not in summary or not best.exists() or facts.checkpoint.resolve() != best.resolve():
        measured = "Not measured for these weights: `accelerate launch eval.py --run RUN --checkpoint PATH` does it."
        return f"{measured}\n\n{facts.comparison}"
    rows = ["| split | images | accuracy | loss |", "|---|---|---|---|"]
    if facts.data.val is not None and isinstance(summary.get("best_val_accuracy"), float):
        rows.append(
            f"| validation (chose the weights) | {len(facts.data.val)} | {summary['best_val_accuracy']:.2%} | |"
        )
    test = f"| test | {len(facts.data.test):,} | {summary['test_accuracy']:.2%} | {summary['test_loss']:.4f} |"
    mirrored = "\n\nProbabilities are the mean over each image and its mirror image." * facts.preprocessing.mirrored
    return "\n".join([*rows, test]) + f"{mirrored}\n\n{facts.comparison}"


def _limits(facts: Facts) -> list[str]:
    _, height, width = facts.preprocessing.shape
    counts = np.bincount(facts.data.train.drawn_labels, minlength=len(facts.data.classes))
    names = facts.preprocessing.classes
    shown = ", ".join(names[:_MOST_CLASSES]) + (", ..." if len(names) > _MOST_CLASSES else "")
    lines = [
        f"For images like those of {facts.source}. What it does with others (another camera, another crop, "
        "another time) has not been measured.",
        f"It knows these classes alone, and gives one of them for every image, also where none is right: {shown}.",
        f"It sees {height}x{width} pixels: what cannot be told at that size, it cannot tell.",
        "Its probabilities were not calibrated: look at right and wrong ones before a threshold is set.",
        f"It was trained on {len(facts.data.train):,} images, {counts.min():,} of the rarest class and "
        f"{counts.max():,} of the most frequent. What is missing among them, it has not learned.",
    ]
    config = facts.config.model
    if config.pretrained or config.hub_weights:
        lines.append("Training began with published weights: their training images and licence count, too.")
    elif config.checkpoint or facts.config.run.from_run:
        lines.append("Training began with the weights of an earlier training: its images count, too.")
    return lines


def _training(facts: Facts) -> str:
    summary, default = read_summary(facts.run_dir), shaping_settings(Config())
    differing = {key: value for key, value in shaping_settings(facts.config).items() if value != default[key]}
    hidden = {key: "(a file)" for key in _PLACES if differing.get(key)}
    hidden |= {"data.source": facts.source} if "data.source" in differing else {}
    settings = [f"{key}: {value}" for key, value in (differing | hidden).items()]
    lines = ["Settings that differ from Lockstep's defaults:", "\n".join(["```", *settings, "```"])]
    steps = [f"{summary[key]} {key}" for key in ("steps", "epochs") if key in summary]
    start = (read_starts(facts.run_dir) or [{}])[-1]
    digest = f"digest of weights, statistics and average: `{facts.digest}`, as in metrics.jsonl" if facts.digest else ""
    lines.append("- " + "\n- ".join(filter(None, [", ".join(steps), *_environment(start), digest])))
    return "\n\n".join(lines)


def _environment(start: dict[str, Any]) -> list[str]:
    """Of the run's last start."""
    versions = start.get("versions", {})
    gpus = start.get("gpus") or []
    on = gpus[0] if gpus and start.get("device") != "cpu" else start.get("cpu", "unknown hardware")
    processes = start.get("processes", "?")
    precision = start.get("numerics", {}).get("precision", "unknown")
    return [
        f"{processes} process{'es' * (processes != 1)} on {on}, {precision}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"lockstep at commit {start['git_commit']}" if start.get("git_commit") else "",
    ]


def _files(folder: Path, facts: Facts) -> str:
    name = FORMATS[facts.form].file
    return f"`{name}`: SHA-256 `{checksum(folder / name)}`. `preprocessing.json`: size, normalisation, class names."
