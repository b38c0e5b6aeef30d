"""Settings as YAML read back as they were written, and nothing else is taken for settings."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.errors import UserError
from lockstep.settings.cli import parse_config
from lockstep.settings.config import Config, settings_digest
from lockstep.settings.types import is_name
from lockstep.settings.yaml import config_to_yaml, load_config

fractions = st.floats(0, 0.5)
# Text that YAML, or the parser, could take for something else.
TRAPS = ["null", "None", "~", "true", "no", "1e5", "1e-3", "007", "1_000", "0x1f", ".5", "2020-01-01", "{a: b}", "[1]"]
TRAPS += ["- x", "a: b", "# c", "=", "%", "!x", "&a", "*a", "'", '"', "a\nb", "é"]
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=12) | st.sampled_from(
    TRAPS
)


def is_something(text: str) -> bool:
    """False for text such as ~ or null, which in a setting that may be null means null."""
    try:
        return yaml.safe_load(text) is not None
    except yaml.YAMLError:
        return True


names = words.filter(is_something)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    config = Config()
    name = draw(names.filter(lambda text: is_name(text) and "/" not in text and text not in (".", "..")))
    run = replace(
        config.run,
        name=name,
        notes=draw(words),
        tags=tuple(draw(st.lists(words, max_size=3))),
        group=draw(st.none() | names),
        seed=draw(st.integers(0, 2**63 - 1)),
        max_hours=draw(st.none() | st.floats(1e-9, 1e9)),
    )
    channels = draw(st.none() | st.lists(st.floats(1e-5, 1), min_size=1, max_size=4).map(tuple))
    augment = replace(
        config.augment,
        jitter=tuple(draw(st.lists(fractions, max_size=4))),
        mixup=draw(st.none() | fractions),
        mean=channels,
        std=channels,
        flip=draw(st.booleans()),
    )
    return replace(
        config,
        run=run,
        augment=augment,
        model=replace(config.model, hidden=tuple(draw(st.lists(st.integers(1, 999), max_size=3)))),
        optim=replace(config.optim, lr=draw(st.floats(1e-12, 1e6)), clip_norm=draw(st.none() | st.floats(1e-6, 9))),
        schedule=replace(config.schedule, milestones=tuple(sorted(draw(st.lists(st.floats(0, 99), max_size=3))))),
    )


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs())
def test_settings_read_back_as_they_were_written(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    read = load_config(path)
    assert read == config
    assert settings_digest(read) == settings_digest(config)


@pytest.mark.parametrize("text", TRAPS)
def test_free_text_reads_back_whatever_it_looks_like(text: str, tmp_path: Path) -> None:
    config = replace(Config(), run=replace(Config().run, name="mine", notes=text, tags=(text, "other")))
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_written_settings_are_plain_yaml_with_every_setting() -> None:
    config = parse_config(["--run.tags=[a,b]"])
    content = yaml.safe_load(config_to_yaml(config))
    assert content["run"]["tags"] == ["a", "b"] and content["augment"]["mixup"] is None
    assert {section: set(values) for section, values in content.items()} == {
        section: {setting.name for setting in fields(values)} for section, values in vars(config).items()
    }


@pytest.mark.parametrize(
    ("written", "mode"), [("off", "off"), ("default", "default"), ("false", "off"), ("true", "default")]
)
def test_a_mode_of_the_compiler_may_be_a_truth_value(tmp_path: Path, written: str, mode: str) -> None:
    (tmp_path / "config.yaml").write_text(f"runtime: {{compile: {written}}}")
    assert load_config(tmp_path / "config.yaml").runtime.compile == mode


def test_settings_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.yaml does not exist"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "old.yaml").write_text("optim: {lrr: 1}")
    with pytest.raises(ValueError, match=r"old\.yaml"):
        load_config(tmp_path / "old.yaml")


def test_reading_settings_neither_prints_nor_ends_the_program(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for text in ("optim: {lr: fast}", "optim: {lr: -1}", "optim: [", "a: 1", "optim: {lr: 1, lr: 2}"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml"):
            load_config(tmp_path / "config.yaml")
    assert capfd.readouterr() == ("", "")
