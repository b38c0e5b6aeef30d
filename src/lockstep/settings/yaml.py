"""Settings as YAML, and back: strict about what it reads, so that nothing a person wrote is lost or taken for more."""

import re
from collections.abc import Hashable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from lockstep.errors import UserError, did_you_mean
from lockstep.settings.config import Config
from lockstep.settings.types import checked

Sections = dict[str, dict[str, Any]]
"""section -> setting -> value"""

SECTIONS = {name: type(section) for name, section in vars(Config()).items()}
HINTS = {
    f"{name}.{setting.name}": get_type_hints(cls)[setting.name]
    for name, cls in SECTIONS.items()
    for setting in fields(cls)
}
"""`section.key` -> the type of its value, for every setting"""


_TAG = "tag:yaml.org,2002:"
_WHOLE = re.compile(r"[-+]?(0|[1-9][\d_]*)$")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.[\d_]*|\.\d+|(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_TRUTH = re.compile(r"(true|True|TRUE|false|False|FALSE)$")


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """By first letter, what plain text stands for: YAML 1.1, but 1e-3 is a number.

    And no, 2020-01-01, 1:30 (90 in YAML 1.1) and 010 (8) are text.
    """
    ours = [_TAG + name for name in ("timestamp", "bool", "int", "float")]
    resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in ours]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        resolvers[first] = [*resolvers[first], (_TAG + "int", _WHOLE), (_TAG + "float", _NUMBER)]
    for first in "tTfF":
        resolvers[first] = [*resolvers.get(first, []), (_TAG + "bool", _TRUTH)]
    return resolvers


class _Loader(yaml.SafeLoader):
    """YAML whose mappings may not name a key twice."""

    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for position, key in enumerate(keys) if key in keys[:position]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"{twice} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 1e5, which YAML 1.1 leaves plain but is read back as a number."""

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> yaml.ScalarNode:
        like_a_number = tag == "tag:yaml.org,2002:str" and value[:1] in "+-.0123456789"
        return super().represent_scalar(tag, value, "'" if like_a_number else style)


def load_yaml(text: str) -> Any:
    """What a YAML text says; raises UserError in one line if it is none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as mistake:
        raise UserError(f"is not YAML: {' '.join(str(mistake).split())}") from mistake
    except RecursionError as mistake:
        raise UserError("is not YAML that can be read: it is nested too deeply") from mistake


def read_yaml(path: Path) -> Any:
    """What a YAML file says; raises UserError in one line, naming the file, if it is none."""
    try:
        if not path.is_file():
            raise UserError("is not a file" if path.exists() else "does not exist")
        return load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as mistake:
        raise UserError(f"{path} is not YAML: it is no text ({mistake.reason})") from mistake
    except UserError as mistake:
        raise UserError(f"{path} {mistake}") from mistake
    except OSError as problem:
        raise UserError(f"{str(path)[:200]} cannot be read: {problem.strerror}") from problem


def read_settings(path: Path) -> Sections:
    """The settings that a YAML file holds, each of its type; raises UserError that names the file and what is wrong."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path} must hold sections such as `optim:`, not {found}")
    return {str(name): _section(path, name, values) for name, values in content.items()}


def _section(path: Path, name: Any, values: Any) -> dict[str, Any]:
    if name not in SECTIONS:
        raise UserError(f"{path}: unknown section {name}.{did_you_mean(str(name), [*SECTIONS, *HINTS])}")
    if not isinstance(values, dict):
        raise UserError(f"{path}: section {name} must hold settings, for example `{name}: {{key: value}}`")
    for key in values:
        if f"{name}.{key}" not in HINTS:
            raise UserError(f"{path}: unknown setting {name}.{key}.{did_you_mean(f'{name}.{key}', HINTS)}")
    try:
        return {key: checked(f"{name}.{key}", value, HINTS[f"{name}.{key}"]) for key, value in values.items()}
    except UserError as mistake:
        raise UserError(f"{path}: {mistake}") from mistake


def build_config(sections: Sections) -> Config:
    """The Config with these settings, and defaults for the others; raises UserError for a contradiction."""
    return Config(**{name: cls(**sections.get(name, {})) for name, cls in SECTIONS.items()})


def load_config(path: Path) -> Config:
    """Read a file of settings; raises UserError that names the file."""
    try:
        return build_config(read_settings(path))
    except UserError as mistake:
        message = str(mistake)
        raise UserError(message if str(path) in message else f"{path}: {message}") from mistake


def config_to_yaml(config: Config) -> str:
    """All settings, defaults included, as YAML that `load_config` turns into an equal Config."""
    sections = {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for name, values in asdict(config).items()
    }
    return yaml.dump(sections, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
