"""The README's commands exist, its settings parse, its files are there."""

import re
import shlex
import subprocess

import pytest
from programs import ROOT

from lockstep.settings.cli import parse_config

README = (ROOT / "README.md").read_text()
_STARTS = r"(?:make|accelerate launch|python(?: -m)?) "
_IN_BLOCKS = re.findall(rf"^(?:trap '' USR2; exec )?({_STARTS}[^#\n]+)", README, re.MULTILINE)
_IN_TEXT = re.findall(rf"`({_STARTS}[^`]+)`", README)
COMMANDS = sorted({command.strip() for command in _IN_BLOCKS + _IN_TEXT})


def test_commands_were_found() -> None:
    assert len(COMMANDS) >= 10 and any(command.startswith("make train") for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c and "<" not in c])
def test_train_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("...", ""))
    position = next(i for i, word in enumerate(words) if word == "train.py")
    options = words[:position]
    for flag, value in zip(options, options[1:], strict=False):
        if flag == "--config_file":
            assert (ROOT / value).is_file()
    arguments = words[position + 1 :]
    if arguments != ["--help"]:
        parse_config(arguments)


def test_files_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(((?!https?:)[^)]+)\)", README)
    names = re.findall(r"`((?:accelerate_configs|configs|src|docs)/[\w/.]+)`", README)
    assert targets
    for name in (*targets, *names):
        assert (ROOT / name).exists(), name


def test_recipes_of_the_table_exist() -> None:
    rows = [
        row for row in README.splitlines() if row.startswith("| `") and ("not yet run" in row or "test accuracy" in row)
    ]
    recipes = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(recipes) == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
