"""The forms in which a network leaves: a writer, and a reader that gives it back as a function, for each."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lockstep.errors import UserError, first_line
from lockstep.export.classifier import WEIGHTS, Classifier, load_exported, settings_of_network
from lockstep.export.hub_folder import describe_for_timm, load_by_timm
from lockstep.export.preprocessing import write_preprocessing
from lockstep.files import write_json
from lockstep.settings.config import ModelConfig

Outputs = Callable[[Tensor], Tensor]
"""Float images (N, C, H, W) in [0, 1] to logits (N, classes)"""


class Format(NamedTuple):
    """One form. `write` leaves files in a folder, `read` gives what they compute."""

    files: tuple[str, ...]
    """That it alone leaves in the folder, the network first"""
    write: Callable[[Classifier, ModelConfig, Path], None]
    read: Callable[[Path], Outputs]
    normalises: bool
    """Whether normalisation is within the file"""
    needs: tuple[str, ...] = ()
    """Packages beside those of requirements.txt"""

    @property
    def file(self) -> str:
        """The network's."""
        return self.files[0]


def write_export(name: str, classifier: Classifier, config: ModelConfig, folder: Path) -> None:
    """Write the network in a form of FORMATS, and `preprocessing.json`, into a folder.

    Raises UserError for packages that are missing, and for a network that torch cannot export.
    """
    form = FORMATS[name]
    require_packages(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn of their own insides
            form.write(classifier, config, folder)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"torch {torch.__version__} cannot export {config.name} to {name} ({first_line(error)}): take another --to"
        ) from error
    settings = settings_of_network(config)
    write_preprocessing(folder, classifier.preprocessing, inside=form.normalises, network=settings)


def require_packages(name: str) -> None:
    """Raise UserError, naming what to install, unless all packages of a form are there."""
    missing = [package for package in FORMATS[name].needs if find_spec(package) is None]
    if missing:
        raise UserError(f"--to {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _write_weights(classifier: Classifier, config: ModelConfig, folder: Path) -> None:
    weights = {name: value.clone().contiguous() for name, value in classifier.network.state_dict().items()}
    save_file(weights, folder / WEIGHTS)


def _write_hub_folder(classifier: Classifier, config: ModelConfig, folder: Path) -> None:
    _write_weights(classifier, config, folder)
    write_json(folder / "config.json", describe_for_timm(classifier, config))


def _read_hub_folder(folder: Path) -> Outputs:
    return load_by_timm(folder) or load_exported(folder)


def _write_torch_export(classifier: Classifier, config: ModelConfig, folder: Path) -> None:
    images = _example(classifier)
    program = torch.export.export(classifier, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    torch.export.save(program, folder / "model.pt2")


def _read_torch_export(folder: Path) -> Outputs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11 warns of the archive's memory
        return torch.export.load(folder / "model.pt2").module()


def _write_onnx(classifier: Classifier, config: ModelConfig, folder: Path) -> None:
    program = torch.onnx.export(
        classifier,
        (_example(classifier),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch"}},
        verbose=False,
    )
    assert program is not None
    program.save(folder / "model.onnx", external_data=False)


def _read_onnx(folder: Path) -> Outputs:
    import onnxruntime  # here, because few have it

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _example(classifier: Classifier) -> Tensor:
    """Two images: with one, exporters take the number for a constant."""
    return torch.rand(2, *classifier.preprocessing.shape)


FORMATS = {
    "safetensors": Format((WEIGHTS,), _write_weights, load_exported, normalises=False),
    "hub-folder": Format((WEIGHTS, "config.json"), _write_hub_folder, _read_hub_folder, normalises=False),
    "torch_export": Format(("model.pt2",), _write_torch_export, _read_torch_export, normalises=True),
    "onnx": Format(
        ("model.onnx",), _write_onnx, _read_onnx, normalises=True, needs=("onnx", "onnxscript", "onnxruntime")
    ),
}
