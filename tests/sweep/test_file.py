"""Sweep files: the tasks they come to, and what is refused."""

from pathlib import Path

import pytest
from programs import ROOT

from lockstep.settings.cli import parse_config
from lockstep.sweep.file import Metric, read_sweep, spelled

FILES = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_grid_has_every_combination_and_the_last_parameter_changes_fastest(tmp_path: Path) -> None:
    text = "method: grid\nparameters: {optim.lr: {values: [0.1, 0.2]}, run.seed: {values: [0, 1]}, "
    text += "train.epochs: {value: 3}}"
    sweep = read_sweep(written(tmp_path, text))
    flags = [" ".join(spelled(task)) for task in sweep.tasks]
    assert flags == [
        f"--optim.lr={lr} --run.seed={seed} --train.epochs=3" for lr in ("0.1", "0.2") for seed in ("0", "1")
    ]


RANDOM = """
name: {name}
method: random
run_cap: {count}
parameters:
  optim.lr: {{distribution: log_uniform_values, min: 0.001, max: 0.1}}
  model.dropout: {{min: 0.1, max: 0.5}}
  train.epochs: {{min: 2, max: 5}}
  augment.mixup: {{values: [null, 0.2], probabilities: [0.9, 0.1]}}
  schedule.peak: {{distribution: q_uniform, min: 0.1, max: 0.9, q: 0.1}}
"""


def test_random_tasks_follow_from_the_name_and_a_higher_count_adds_to_them(tmp_path: Path) -> None:
    few, many, other = (
        read_sweep(written(tmp_path, RANDOM.format(name=name, count=count))).tasks
        for name, count in (("a", 5), ("a", 300), ("b", 5))
    )
    assert many[:5] == few and len(many) == 300 and set(map(str, few)).isdisjoint(map(str, other))
    rates = [task["optim.lr"] for task in many]
    assert 0.001 <= min(rates) and max(rates) <= 0.1
    assert 0.35 < sum(rate < 0.01 for rate in rates) / 300 < 0.65, "uniform in the logarithm"
    assert {task["train.epochs"] for task in many} == {2, 3, 4, 5}
    assert 0.8 < sum(task["augment.mixup"] is None for task in many) / 300 < 0.98
    assert {task["schedule.peak"] for task in many} == {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}


def test_draws_that_repeat_are_drawn_again_until_there_are_none(tmp_path: Path) -> None:
    text = "method: random\nrun_cap: {}\nparameters: {{optim.lr: {{values: [1, 2, 3]}}, run.seed: {{values: [1, 2]}}}}"
    tasks = read_sweep(written(tmp_path, text.format(6))).tasks
    assert len({str(task) for task in tasks}) == 6
    with pytest.raises(ValueError, match="no 7 different tasks can be drawn, only 6"):
        read_sweep(written(tmp_path, text.format(7)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: bayes\nparameters: {optim.lr: {min: 0, max: 1}}", "bayes needs W&B's server"),
        ("method: grid\nparameters: {optim.rl: {values: [1]}}", "optim.rl is no setting .*Did you mean optim.lr"),
        ("method: grid\nparameters: {data.workers: {values: [1, 2]}}", "data.workers is no setting that"),
        ("method: grid\nparameters: {optim.lr: {min: 0.0, max: 1.5}}", "optim.lr needs `values`"),
        ("method: grid\nparameters: {optim.lr: {values: [1, 1]}}", "optim.lr has a value twice"),
        ("method: grid\nparameters: {optim.lr: 1}", "optim.lr needs `value`"),
        ("method: random\nparameters: {optim.lr: {values: [1]}}", "needs `run_cap`"),
        ("method: random\nrun_cap: 2\nparameters: {optim.lr: {distribution: bta}}", "bta is not one of .*mean beta"),
        (
            "method: random\nrun_cap: 2\nparameters: {optim.lr: {distribution: uniform, min: 1}}",
            "uniform does not go with .*max",
        ),
        ("method: grid", "there are no parameters"),
        ("- a", "must hold method and parameters"),
        ("a: [", "is not YAML"),
        ("method: grid\nparameters: {optim.lr: {value: 1}}\ncommand: [python, x.py]", "command must name"),
        ("method: grid\nparameters: {optim.lr: {value: 1}}\ncommand: 5", "command must be a list"),
        ("method: grid\nparameters: {optim.lr: {values: [fast]}}", "optim.lr=fast: expected a number"),
        ("method: grid\nparameters: {optim.lr: {values: [1e-3, 0.001]}}", "optim.lr has a value twice"),
        ("method: grid\nparameters: {optim.lr: {value: 1}, optim.lr: {value: 2}}", "optim.lr stands there twice"),
        ("method: grid\nparameters: {1: {value: 1}}", "1 is no setting"),
        ("method: grid\nparameters: " + "[" * 100_000, "nested too deeply"),
        (
            f"method: random\nrun_cap: 10000\nparameters: {{optim.lr: {{values: {[1 / n for n in range(1, 9002)]}}}}}",
            "no 10000 different tasks can be drawn, only 9001",
        ),
    ],
)
def test_what_cannot_be_enumerated_is_one_line_that_names_the_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_sweep(written(tmp_path, text))
    assert "sweep.yaml" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_of_the_repository(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task parses and has a run folder of its own."""
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(path)
    configs = [parse_config(sweep.arguments_of(index)) for index in range(len(sweep.tasks))]
    assert len({config.run.name for config in configs}) == len(configs) >= 2
    assert {config.run.group for config in configs} == {path.stem}
    assert f"configs/sweeps/{path.name}" in path.read_text()


def test_there_are_a_grid_and_a_random_sweep() -> None:
    assert {line for path in FILES for line in path.read_text().splitlines() if line.startswith("method:")} == {
        "method: grid",
        "method: random",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_wandb_accepts_the_files(path: Path) -> None:
    """The check that `wandb sweep` makes before it asks a server."""
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    config = load_sweep_config(str(path))
    assert config and config["method"] in ("grid", "random") and config["program"] == "train.py"
