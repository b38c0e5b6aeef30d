"""The command line: recipes and --section.key=value become a Config.

argparse reads flags from left to right, and a recipe's settings take their place among them, so the last one wins.
"""

import argparse
import ast
import difflib
import inspect
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

from lockstep.errors import UsageError, UserError, did_you_mean, print_line
from lockstep.files import path_of, read_json
from lockstep.settings import config as config_module
from lockstep.settings.config import Config, settings_digest
from lockstep.settings.types import checked, describe, options_of, written
from lockstep.settings.yaml import HINTS, SECTIONS, build_config, config_to_yaml, load_yaml, read_settings

RECIPES = Path(__file__).resolve().parents[3] / "configs"
DEFAULT_RECIPE = RECIPES / "digits_cnn.yaml"

_OTHER_FLAGS = ("config", "print_config", "print_run_dir", "help")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


_MOST_SHOWN = 200


class _TakeRecipe(argparse.Action):
    """`--config FILE`: all settings of a file."""

    def __call__(self, parser: Any, namespace: Any, value: Any, flag: Any = None) -> None:
        path = Path(value)
        if not os.path.exists(path):  # unlike Path.exists, also of a name that is too long
            known = [str(Path("configs") / recipe.name) for recipe in RECIPES.glob("*.yaml")]
            raise UserError(f"recipe {value[:_MOST_SHOWN]} does not exist.{did_you_mean(value[:_MOST_SHOWN], known)}")
        namespace.recipe = path
        for section, values in read_settings(path).items():
            namespace.sections[section] |= values


class _TakeSetting(argparse.Action):
    """`--section.key=value`, and W&B's `--section={key: value, ...}`."""

    def __call__(self, parser: Any, namespace: Any, value: Any, flag: Any = None) -> None:
        if self.dest in SECTIONS:
            values = from_text(value, dict)
            if not isinstance(values, dict):
                raise UserError(f"--{self.dest}={value}: a section takes settings, as in --{self.dest}.key=value")
            for key, item in values.items():
                namespace.sections[self.dest][key] = _checked(f"{self.dest}.{key}", item)
            return
        section, key = self.dest.split(".")
        namespace.sections[section][key] = _checked(self.dest, from_text(value, HINTS[self.dest]))


def _checked(setting: str, value: Any) -> Any:
    if setting not in HINTS:
        _refuse(f"--{setting}")
    return checked(setting, value, HINTS[setting])


def from_text(text: str, hint: Any) -> Any:
    """What the text of a flag stands for: itself where the setting is text, else YAML; None and null are nothing."""
    options = options_of(hint)
    if text in ("None", "null") and (str not in options or type(None) in options):
        return None
    if str in options:
        return text
    try:
        return load_yaml(text)
    except UserError:
        return text  # which is of no other type


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="train.py",
        usage="accelerate launch train.py [--config configs/NAME.yaml] [--section.key=value ...]",
        description="Train an image classifier. Settings come from a YAML recipe (default: configs/digits_cnn.yaml), "
        "then from flags; the last one wins. Lists are written [1, 2], nothing is null or None. Where a setting takes "
        "a name, any unknown one, such as ?, lists those that there are.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=_TakeRecipe, metavar="FILE", help="a YAML file of settings; may be repeated")
    parser.add_argument("--print_config", action="store_true", help="print all settings of this command, and end")
    parser.add_argument("--print_run_dir", action="store_true", help="print the run folder of this command, and end")
    for name, cls in SECTIONS.items():
        explained = _explanations()[cls.__name__]
        group = parser.add_argument_group(name, inspect.getdoc(cls))
        group.add_argument(f"--{name}", action=_TakeSetting, help=argparse.SUPPRESS)
        for setting in fields(cls):
            flag = f"{name}.{setting.name}"
            default = written(setting.default)
            text = f"{explained[setting.name]} ({describe(HINTS[flag])}; default: {default})".replace("%", "%%")
            group.add_argument(f"--{flag}", action=_TakeSetting, metavar="", help=text)
    return parser


@cache
def _explanations() -> dict[str, dict[str, str]]:
    """The text under each field of each dataclass of config.py, by class and field."""
    classes = [node for node in ast.parse(inspect.getsource(config_module)).body if isinstance(node, ast.ClassDef)]
    return {
        definition.name: {
            field.target.id: text.value.value
            for field, text in zip(definition.body, definition.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        }
        for definition in classes
    }


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """The settings of a command line (default: sys.argv); raises UsageError for any mistake in it.

    Without --config the embedded quick start, configs/digits_cnn.yaml, is the recipe. A run without a name gets the
    recipe's name and six hex digits of the settings that shape the result. With --help, --print_config and
    --print_run_dir the program ends here.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not any(argument.split("=")[0] == "--config" for argument in given):
        given = ["--config", str(DEFAULT_RECIPE), *given]
    namespace = argparse.Namespace(sections={name: {} for name in SECTIONS}, recipe=None)
    try:
        _, unknown = _build_parser().parse_known_args(given, namespace)
        if unknown:
            _refuse(unknown[0])
        config = _with_name(build_config(namespace.sections), namespace.recipe)
    except UsageError:
        raise
    except UserError as mistake:
        raise UsageError(str(mistake)) from mistake
    if namespace.print_config or namespace.print_run_dir:
        print_line(config_to_yaml(config) if namespace.print_config else str(run_dir_of(config)))
        raise SystemExit(0)
    return config


_ELSEWHERE = {
    "accum": "train.micro_batch_size",
    "amp": "runtime.precision",
    "dataset": "data.source",
    "data_dir": "data.root",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "learning_rate": "optim.lr",
    "mixed_precision": "runtime.precision",
    "num_classes": "data.num_classes",
    "num_epochs": "train.epochs",
    "num_workers": "data.workers",
    "opt": "optim.name",
    "optimizer": "optim.name",
    "output_dir": "run.root",
    "per_device_train_batch_size": "train.micro_batch_size",
    "scheduler": "schedule.name",
    "streaming": "data.memory_budget",
}
"""What other programs call a setting"""


def _refuse(argument: str) -> NoReturn:
    if not argument.startswith("--"):
        raise UserError(f"{argument} is no setting: settings are written --section.key=value")
    name = argument.split("=")[0].removeprefix("--")
    last = name.rsplit(".", 1)[-1].lower().replace("-", "_")
    if foreign := difflib.get_close_matches(last, _ELSEWHERE, n=1, cutoff=0.8):
        raise UserError(f"unknown setting --{name}. Here it is --{_ELSEWHERE[foreign[0]]}")
    raise UserError(f"unknown setting --{name}.{did_you_mean(name, [*HINTS, *_OTHER_FLAGS])}")


def _with_name(config: Config, recipe: Path) -> Config:
    if config.run.name is not None:
        return config
    return replace(config, run=replace(config.run, name=f"{recipe.stem}-{settings_digest(config)}"))


def run_dir_of(config: Config) -> Path:
    """The run folder that settings name."""
    return path_of(config.run.root) / str(config.run.name)


@dataclass(frozen=True)
class Evaluation:
    """What eval.py was asked for."""

    config: Config
    folder: Path
    """Where results go: the run folder, or the checkpoint's own"""
    checkpoint: Path | None
    """None: the weights that the settings name"""
    split: str
    temperature: float | Literal["fit"] | None = None
    images: Path | None = None
    """Of a file or folder, instead of a split's"""


def parse_evaluation(arguments: Sequence[str] | None = None) -> Evaluation:
    """eval.py's command line (default: sys.argv); raises UsageError for any mistake in it."""
    parser = _Parser(
        prog="eval.py",
        usage="accelerate launch eval.py --run runs/NAME [--checkpoint best|last|PATH] [--split test] "
        "[--ema true|false] [--temperature fit] [--images PATH] [--section.key=value ...]",
        description="Exact metrics of a checkpoint. Settings are the training's; --section.key=value changes one. "
        "Without --run, of published weights: --model.name=timm/NAME --model.pretrained=true --data.source=SOURCE.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="the run folder, runs/NAME")
    parser.add_argument("--checkpoint", default="best", help="best, last, a checkpoint folder or a .safetensors file")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")
    text = "the average of the weights, or the weights themselves; default: the average, if the run has one"
    parser.add_argument("--ema", choices=("true", "false"), help=text)
    text = "what logits are divided by: a number, or fit, which finds the best for the validation split; default: none"
    parser.add_argument("--temperature", type=_temperature, metavar="fit|NUMBER", help=text)
    text = "predict the classes of an image file, or of all in a folder, instead of evaluating a split"
    parser.add_argument("--images", type=Path, metavar="PATH", help=text)
    known, overrides = parser.parse_known_args(arguments)
    if known.images is not None and known.temperature == "fit":
        raise UsageError("--images have no labels to fit a temperature to: give the number that --split=val found")
    if known.run is None and known.checkpoint == "best":
        return _of_published_weights(known, overrides)
    checkpoint = find_weights(known.run, known.checkpoint)
    folder = known.run or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    checkpoint = _with_or_without_average(checkpoint, known.ema)
    trained = trained_precision(folder) if known.run else []
    config = parse_config(["--config", str(folder / "config.yaml"), *trained, *overrides])
    return Evaluation(config, folder, checkpoint, known.split, known.temperature, known.images)


def _of_published_weights(known: argparse.Namespace, overrides: list[str]) -> Evaluation:
    config = parse_config(overrides)
    if not (config.model.pretrained or config.model.checkpoint):
        raise UsageError(
            "which run? Give --run runs/NAME, --checkpoint with a path, or --model.name=timm/NAME "
            "--model.pretrained=true --data.source=SOURCE"
        )
    if (path_of(str(config.model.checkpoint)) / "config.yaml").is_file():
        place = config.model.checkpoint
        raise UsageError(f"{place} is of a run, which knows its classes and normalisation: give --run runs/NAME")
    if known.ema is not None:
        raise UsageError(f"--ema={known.ema}: published weights have no average beside them: remove it")
    name = config.model.name.removeprefix("timm/")
    if name != config.model.name and not any(flag.startswith("--augment.from_pretrained") for flag in overrides):
        config = replace(config, augment=replace(config.augment, from_pretrained=True))
    folder = path_of(config.run.root) / f"{name}-{settings_digest(config)}"
    return Evaluation(config, folder, None, known.split, known.temperature, known.images)


def _with_or_without_average(checkpoint: Path, wanted: str | None) -> Path:
    """The file that holds the wanted weights; the checkpoint itself, which stands for its best, if none are named."""
    if wanted is None:
        return checkpoint
    if not checkpoint.is_dir():
        raise UsageError(f"--ema={wanted} chooses a file of a checkpoint folder, and {checkpoint} is a file: remove it")
    file = checkpoint / ("ema.safetensors" if wanted == "true" else "model.safetensors")
    if not file.is_file():
        raise UsageError(f"--ema={wanted}: there is no {file} (train.ema_decay makes an average)")
    return file


def _temperature(text: str) -> float | Literal["fit"]:
    if text == "fit":
        return "fit"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is neither fit nor a number above 0")
    return value


def find_weights(run: Path | None, checkpoint: str) -> Path:
    """The checkpoint `best` or `last` of a run, or any path; raises UsageError if it is not there."""
    named = checkpoint in ("best", "last")
    if run is None:
        if named:
            raise UsageError("which run? Give --run runs/NAME, or --checkpoint with a path")
        if not (Path(checkpoint) / "config.yaml").is_file():
            raise UsageError(f"{checkpoint} is no checkpoint folder (it has no config.yaml): give --run runs/NAME too")
        return Path(checkpoint)
    if not (run / "config.yaml").is_file():
        others = {str(path.parent) for path in run.parent.glob("*/config.yaml")}
        raise UsageError(f"there is no run in {run}.{did_you_mean(str(run), others)}")
    path = run / "checkpoints" / checkpoint if named else Path(checkpoint)
    if not path.exists():
        raise UsageError(f"there is no checkpoint {path}" + (" yet" if named else ""))
    return path


def trained_precision(run: Path) -> list[str]:
    """The flag for the precision in force when a run was last started, which its settings leave to the launcher."""
    try:
        return [f"--runtime.precision={read_json(run / 'environment.json')[-1]['precision']}"]
    except (OSError, ValueError, LookupError, TypeError):  # also of what is no file
        return []
