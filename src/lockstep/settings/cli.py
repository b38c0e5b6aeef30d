"""The command line: YAML and --section.key=value become a Config. The only file that knows the CLI library.

jsonargparse does the parsing; what it lacks is here: did-you-mean for every unknown key, one line per error,
W&B's spelling of None, and the default recipe.
"""

import argparse
import difflib
import errno
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from lockstep.settings.config import Config, settings_digest

RECIPES = Path(__file__).resolve().parents[3] / "configs"
DEFAULT_RECIPE = RECIPES / "digits_cnn.yaml"

_FIRST_PROCESS_SPEAKS_SECONDS = 10
_EXIT_SECONDS = 20
"""What a process whose machine or peers let it down may take for its clean-up"""
_SETTINGS = {f"{section}.{key}" for section, values in asdict(Config()).items() for key in values}
_SECTIONS = set(asdict(Config()))
_OTHER_FLAGS = {"config", "print_config", "print_run_dir", "help"}


def suggest(unknown: str, names: Sequence[str] | set[str]) -> str:
    """` Did you mean ...?` for the known names nearest to an unknown one, or an empty string."""
    last_parts = {name.rsplit(".", 1)[-1]: name for name in sorted(names)}
    near = difflib.get_close_matches(unknown, sorted(names), n=3, cutoff=0.6)
    near += [last_parts[part] for part in difflib.get_close_matches(unknown.rsplit(".", 1)[-1], last_parts, n=2)]
    unique = list(dict.fromkeys(near))[:2]
    return f" Did you mean {' or '.join(unique)}?" if unique else ""


def usage_error(message: str) -> NoReturn:
    """Print one line on the first process of this machine and end with exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _last_words(f"error: {message}")
    raise SystemExit(2)


def _last_words(line: str) -> None:
    """Print the line, and leave it to torchrun, whose own report of the failure comes last and ends with it."""
    print(line, file=sys.stderr, flush=True)
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(place).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with exit code 1 and one line for a mistake of the user, and for what happens to a machine.

    That is a ValueError that lockstep raised, a disk that is full or cannot be written, a killed data worker, a process
    of the run that is gone. Any other exception, also a ValueError from inside a library, keeps its traceback.
    Processes that fail alike should say so once: all but the first of a machine give that one time to speak, and the
    launcher then ends them.
    """
    try:
        yield
    except ValueError as mistake:
        innermost = traceback.extract_tb(mistake.__traceback__)[-1].filename
        if not Path(innermost).resolve().is_relative_to(Path(__file__).resolve().parents[1]):
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
            time.sleep(_FIRST_PROCESS_SPEAKS_SECONDS)
        _last_words(f"error: {mistake}")
        raise SystemExit(1) from None
    except (OSError, RuntimeError) as blow:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises from there, again, for each worker that ends
        line = _describe_blow(blow)
        if line is None:
            raise
        _last_words(line)
        # Seen: a process that hangs in the clean-up of its interpreter, after its peers had been killed.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_EXIT_SECONDS)
        raise SystemExit(1) from None


_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def _describe_blow(blow: OSError | RuntimeError) -> str | None:
    """One line for what the program cannot help; None for an error of its own."""
    if isinstance(blow, OSError):
        place = f" ({blow.filename})" if blow.filename else ""
        return f"error: {blow.strerror}{place}" if blow.errno in _DISK_TROUBLE else None
    text = str(blow)
    if text.startswith("DataLoader worker"):  # torch raises it wherever the program is when a worker dies
        cause = text.split(". ")[0]
        return f"error: {cause}; if memory is short, lower --data.workers. The same command continues"
    if "gloo" in text and any(sign in text for sign in _PEER_GONE):
        return "ended: another process of this run is gone; it, or the launcher, says why. The same command continues"
    return None


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        usage_error(_one_line(message))


def _one_line(message: str) -> str:
    """The parser's message without its wrapping, with the nearest names where a key or a choice is unknown."""
    message = " ".join(message.split())
    unknown = re.search(r"[Uu]nrecognized arguments?: (\S+)", message)
    if unknown:
        flag = unknown.group(1).split("=")[0].lstrip("-")
        return f"unknown setting --{flag}.{suggest(flag, _SETTINGS | _OTHER_FLAGS)}"
    wrong_type = re.search(r"Parser key \"([\w.]+)\": .*?Expected a (.+?)\. Got value: (.*)$", message)
    if wrong_type:
        key, expected, value = wrong_type.groups()
        choices = re.findall(r"'([^']*)'", expected) if "Literal" in expected else []
        if choices:
            return f"--{key}={value} is not one of {', '.join(choices)}.{suggest(value, set(choices))}"
        type_name = re.sub(r"<class '(.+?)'>", r"\1", expected)
        return f"--{key}={value}: expected {type_name}"
    none_fits = re.search(r"Parser key \"([\w.]+)\": .*?Subtypes: \[(.+?)\] Errors.*Given value: (.*)$", message)
    if none_fits:
        key, expected, value = none_fits.groups()
        words = re.findall(r"<class '(\w+)'>|Literal\['(\w+)'\]", expected)
        types = ["".join(word) for word in words] or [expected]
        return f"--{key}={value}: expected {' or '.join(types).replace('NoneType', 'null')}"
    return message


def _check_recipe(recipe: str) -> None:
    """Name the file and the unknown section or key; the parser alone would not say which file it was."""
    path = Path(recipe)
    if not path.is_file():
        raise ValueError(f"recipe {recipe} does not exist.{suggest(recipe, {str(p) for p in _known_recipes()})}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as mistake:
        raise ValueError(f"{recipe} is not YAML: {mistake}") from mistake
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ValueError(f"{recipe} must hold sections such as `optim:`, not {found}")
    for section, values in content.items():
        if section not in _SECTIONS:
            raise ValueError(f"{recipe}: unknown section {section}.{suggest(str(section), _SECTIONS | _SETTINGS)}")
        if not isinstance(values, dict):
            raise ValueError(f"{recipe}: section {section} must hold settings, for example `{section}: {{key: value}}`")
        for key in values:
            if f"{section}.{key}" not in _SETTINGS:
                raise ValueError(f"{recipe}: unknown setting {section}.{key}.{suggest(f'{section}.{key}', _SETTINGS)}")


def _parser() -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog="train.py",
        usage="accelerate launch train.py [--config configs/NAME.yaml] [--section.key=value ...]",
        description="Train an image classifier. Settings come from a YAML recipe (default: configs/digits_cnn.yaml), "
        "then from flags; the last one wins. Lists are written [1, 2], nothing is null or None.",
        allow_abbrev=False,
        exit_on_error=True,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file of settings; several may follow one another")
    parser.add_argument(
        "--print_run_dir",
        action="store_true",
        default=argparse.SUPPRESS,  # else it would be a setting of --print_config
        help="Print the run folder of this command and end, without waiting for torch",
    )
    for section, cls in _section_classes().items():
        parser.add_class_arguments(cls, section, as_group=True)
    return parser


def _section_classes() -> dict[str, type]:
    return {name: type(section) for name, section in vars(Config()).items()}


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML and for comparison after a reload."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _wandb_spelling(argument: str) -> str:
    """W&B writes None where YAML has null."""
    return re.sub(r"^(--[\w.]+)=None$", r"\1=null", argument)


def _to_config(values: Namespace) -> Config:
    sections = {}
    for name, cls in _section_classes().items():
        fields = values[name].as_dict() if isinstance(values[name], Namespace) else dict(values[name])
        sections[name] = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    return Config(**sections)


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """The settings of a command line (default: sys.argv); ends the program with one line on any mistake.

    Without --config the embedded quick start, configs/digits_cnn.yaml, is the recipe. A run without a name gets
    the recipe's name and six hex digits of the settings that shape the result.
    """
    given = [_wandb_spelling(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    recipes = [given[i + 1] for i, a in enumerate(given[:-1]) if a == "--config"]
    recipes += [a.split("=", 1)[1] for a in given if a.startswith("--config=")]
    if not recipes:
        recipes = [str(DEFAULT_RECIPE)]
        given = ["--config", recipes[0], *given]
    try:
        for recipe in recipes:
            _check_recipe(recipe)
        values = _parser().parse_args(given)
        config = _with_name(_to_config(values), Path(recipes[-1]))
    except (ValueError, TypeError) as mistake:
        usage_error(_one_line(str(mistake)))
    if "print_run_dir" in values:
        print(Path(config.run.root) / str(config.run.name))
        raise SystemExit(0)
    return config


def _known_recipes() -> list[Path]:
    return [Path("configs") / path.name for path in sorted(RECIPES.glob("*.yaml"))]


def _with_name(config: Config, recipe: Path) -> Config:
    if config.run.name is not None:
        return config
    name = f"{recipe.stem}-{settings_digest(config)}"
    return replace(config, run=replace(config.run, name=name))


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 1e5, which YAML 1.1 leaves plain but the parser reads back as a number."""

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> yaml.ScalarNode:
        like_a_number = tag == "tag:yaml.org,2002:str" and value[:1] in "+-.0123456789"
        return super().represent_scalar(tag, value, "'" if like_a_number else style)


def config_to_yaml(config: Config) -> str:
    """All settings, defaults included, as YAML that `load_config` turns into an equal Config."""
    return yaml.dump(_plain(asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_config(path: Path) -> Config:
    """Read back a file of `config_to_yaml`; raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return parse_config(["--config", str(path)])
    except SystemExit as mistake:
        raise ValueError(f"{path} is not a readable configuration") from mistake


@dataclass(frozen=True)
class Evaluation:
    """What eval.py was asked for."""

    config: Config
    folder: Path
    """Where results go: the run folder, or the checkpoint's own"""
    checkpoint: Path
    split: str


class _EvaluationParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        usage_error(message)


def parse_evaluation(arguments: Sequence[str] | None = None) -> Evaluation:
    """eval.py's command line; ends the program with one line on any mistake."""
    parser = _EvaluationParser(
        prog="eval.py",
        usage="accelerate launch eval.py --run runs/NAME [--checkpoint best|last|PATH] [--split test] "
        "[--section.key=value ...]",
        description="Exact metrics of a checkpoint. Settings are the training's; --section.key=value changes one.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="the run folder, runs/NAME")
    parser.add_argument("--checkpoint", default="best", help="best, last, a checkpoint folder or a .safetensors file")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")
    known, overrides = parser.parse_known_args(arguments)
    try:
        checkpoint = _checkpoint_of(known.run, known.checkpoint)
        folder = known.run or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
        trained = _trained_precision(folder) if known.run else []
        return Evaluation(
            parse_config(["--config", str(folder / "config.yaml"), *trained, *overrides]),
            folder,
            checkpoint,
            known.split,
        )
    except ValueError as mistake:
        usage_error(str(mistake))


def _checkpoint_of(run: Path | None, checkpoint: str) -> Path:
    named = checkpoint in ("best", "last")
    if run is None:
        if named:
            raise ValueError("which run? Give --run runs/NAME, or --checkpoint with a path")
        if not (Path(checkpoint) / "config.yaml").is_file():
            raise ValueError(f"{checkpoint} is no checkpoint folder (it has no config.yaml): give --run runs/NAME too")
        return Path(checkpoint)
    if not (run / "config.yaml").is_file():
        others = {str(path.parent) for path in run.parent.glob("*/config.yaml")}
        raise ValueError(f"there is no run in {run}.{suggest(str(run), others)}")
    path = run / "checkpoints" / checkpoint if named else Path(checkpoint)
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}" + (" yet" if named else ""))
    return path


def _trained_precision(run: Path) -> list[str]:
    """The precision in force when the run was last started, which its settings leave to the launcher."""
    try:
        return [f"--runtime.precision={json.loads((run / 'environment.json').read_text())[-1]['precision']}"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
