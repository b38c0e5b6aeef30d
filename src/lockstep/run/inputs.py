"""What the network of a run takes in and puts out: `input.json`, and in what an evaluation departs from it."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lockstep.data.images import Data, ImageSet, build_data
from lockstep.data.sources.source import Identity
from lockstep.errors import UserError
from lockstep.files import read_json, write_json
from lockstep.launch.accelerator import Launch
from lockstep.run.folder import difference_of_data, has_source
from lockstep.settings.config import AugmentConfig, Config

FILE = "input.json"


@dataclass(frozen=True)
class NetworkInput:
    """Images as the network was trained to see them, and the names of its outputs."""

    classes: tuple[str, ...]
    num_classes: int
    """Outputs; may exceed the names"""
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    resize_size: int | None
    """Shorter side before the centre is cut out; None: images come in their size"""
    mean: tuple[float, ...]
    """Per channel, for pixels in [0, 1]"""
    std: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        """Of all outputs: a number for those without a name."""
        return [*self.classes, *map(str, range(len(self.classes), self.num_classes))]

    def under(self, augment: AugmentConfig) -> "NetworkInput":
        """With the size and normalisation that settings give, where they do."""
        changed, channels = self, self.image_shape[0]
        if (size := augment.image_size) is not None:
            changed = replace(changed, image_shape=(channels, size, size), resize_size=round(size / augment.eval_crop))
        if augment.mean is not None and augment.std is not None and len(augment.mean) in (1, channels):
            repeats = channels // len(augment.mean)
            changed = replace(changed, mean=augment.mean * repeats, std=augment.std * repeats)
        return changed


def input_of(data: Data) -> NetworkInput:
    """What a network that is trained on these data takes and puts out."""
    resize_size = data.test.resize_size
    return NetworkInput(data.classes, data.num_classes, data.image_shape, resize_size, data.mean, data.std)


def write_input(run_dir: Path, data: Data) -> None:
    """Write input.json, once: a training that goes on has the same."""
    if not (run_dir / FILE).is_file():
        write_json(run_dir / FILE, asdict(input_of(data)))


def read_input(folder: Path) -> NetworkInput | None:
    """What input.json says, of a run folder or of the one that a checkpoint folder lies in; None if it is not there.

    Raises UserError if it is damaged.
    """
    for place in (folder, *folder.resolve().parents[1:2]):
        try:
            return _checked(read_json(place / FILE))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError) as damage:
            raise UserError(f"{place / FILE} is damaged: remove it, and evaluations ask the data instead") from damage
    return None


def _checked(found: dict[str, Any]) -> NetworkInput:
    channels, height, width = map(int, found["image_shape"])
    resize_size = None if found["resize_size"] is None else int(found["resize_size"])
    mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
    if not (channels in (1, 3) and len(mean) == len(std) == channels and min(height, width, *std) > 0):
        raise ValueError("these are no images")
    classes, num_classes = tuple(map(str, found["classes"])), int(found["num_classes"])
    return NetworkInput(classes, num_classes, (channels, height, width), resize_size, mean, std)


def differences(trained: NetworkInput, used: NetworkInput) -> list[str]:
    """A line for each way in which images are another sight than in training; raises UserError for other channels."""
    kinds = {1: "grey", 3: "colour"}
    if trained.image_shape[0] != used.image_shape[0]:
        before, now = (kinds[one.image_shape[0]] for one in (trained, used))
        raise UserError(f"images are {now} here, and the network was trained on {before} ones")
    notes = []
    if _size(trained) != _size(used):
        notes.append(f"note: images are {_size(used)} here, and were {_size(trained)} in training")
    if (trained.mean, trained.std) != (used.mean, used.std):
        before, now = (f"mean {_listed(one.mean)} and std {_listed(one.std)}" for one in (trained, used))
        notes.append(f"note: images are normalised by {now} here, and were by {before} in training")
    return notes


def loose_differences(trained: NetworkInput, used: NetworkInput) -> list[str]:
    """The same of images without labels, and a line if those of the training were never resized."""
    if used.resize_size is not None:
        return differences(trained, used)
    remark = f"note: in training images came in {_size(trained)} and were not resized: those of another size are, here"
    return [*differences(trained, used), remark]


def _size(images: NetworkInput) -> str:
    _, height, width = images.image_shape
    cut = f" (cut from {images.resize_size})" if images.resize_size not in (None, min(height, width)) else ""
    return f"{height}x{width}{cut}"


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def open_data(folder: Path, config: Config, launch: Launch, split: str | None = None) -> Data:
    """The data of these settings as the network of the run in `folder` knows them, for an evaluation of `split`.

    The main process says each departure from the training in a line. Raises UserError as `build_data` does, and if the
    run's own data have changed.
    """
    trained = read_input(folder)

    def accept(identity: Identity) -> None:
        launch.require_alike("data", identity)
        if (note := difference_of_data(folder, config, identity)) and trained is None:
            launch.say(note)

    if trained is not None:
        config = replace(config, data=replace(config.data, num_classes=trained.num_classes))
    is_own = has_source(folder, config)
    drawn_in = folder if is_own else None  # other data have no split there
    data, notes = as_trained(build_data(config, drawn_in, write=False, accept=accept), trained, config.augment)
    for note in notes + (describe_split(data, split) if is_own else []):
        launch.say(note)
    return data


def as_trained(data: Data, trained: NetworkInput | None, augment: AugmentConfig) -> tuple[Data, list[str]]:
    """Data as the network of a run knows them, and a line for each departure from its training, if that is known.

    Classes of the same names get the numbers that they had in training; normalisation is the training's unless
    settings give it. Raises UserError as `differences` does.
    """
    if trained is None:
        return data, []
    notes = []
    if augment.mean is None or augment.std is None:
        data = replace(data, mean=trained.mean, std=trained.std)
    if data.classes != trained.classes:
        data, note = _matched(data, trained)
        notes.append(note)
    return data, notes + differences(trained, input_of(data))


def _matched(data: Data, trained: NetworkInput) -> tuple[Data, str]:
    if strangers := [name for name in data.classes if name not in trained.classes]:
        return data, f"note: the network has no class {strangers[0]}: its outputs are taken in the order of these data"
    numbers = torch.tensor([trained.classes.index(name) for name in data.classes])

    def renumbered(images: ImageSet) -> ImageSet:
        labels = torch.where(images.labels < 0, images.labels, numbers[images.labels.clamp(min=0)])
        return replace(images, labels=labels)

    note = f"note: {len(data.classes)} of the network's {len(trained.classes)} classes are here, and not in its order: "
    train, test = renumbered(data.train), renumbered(data.test)
    val = None if data.val is None else renumbered(data.val)
    matched = replace(data, classes=trained.classes, train=train, val=val, test=test)
    return matched, note + "they are matched by name"


def describe_split(data: Data, split: str | None) -> list[str]:
    """A line where the images of a split are not new to the training."""
    if split == "train":
        return ["note: the network was trained on these images: they say nothing of new ones"]
    if split == "test" and data.val is not None and data.test.split is data.val.split:
        return ["note: there is no test split: these are the images by which the best checkpoint was chosen"]
    return []
