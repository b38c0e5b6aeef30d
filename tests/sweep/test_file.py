"""Sweep files: the tasks they come to, and what is refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
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


def test_sections_have_values_of_several_settings_and_parameters_nest(tmp_path: Path) -> None:
    text = """
method: grid
parameters:
  optim: {values: [{name: sgd, lr: 1, momentum: 0.9}, {name: adam, lr: 1e-3}]}
  model: {parameters: {dropout: {values: [null, 0.5]}, hidden: {value: [64, 32]}}}
"""
    sweep = read_sweep(written(tmp_path, text))
    assert [" ".join(spelled(task)) for task in sweep.tasks[1:3]] == [
        "--optim.name=sgd --optim.lr=1.0 --optim.momentum=0.9 --model.dropout=0.5 --model.hidden=[64, 32]",
        "--optim.name=adam --optim.lr=0.001 --model.dropout=null --model.hidden=[64, 32]",
    ]
    drawn = read_sweep(written(tmp_path, text.replace("grid", "random\nrun_cap: 4"))).tasks
    assert sorted(map(str, drawn)) == sorted(map(str, sweep.tasks))


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("", Metric("accuracy", maximize=True)),
        ("metric: {name: val/loss}", Metric("loss", maximize=False)),
        ("metric: {name: val/top5_accuracy, goal: maximize}", Metric("top5_accuracy", maximize=True)),
    ],
)
def test_metric(text: str, metric: Metric, tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path, f"method: grid\nparameters: {{optim.lr: {{value: 1}}}}\n{text}"))
    assert sweep.metric == metric and sweep.hyperband is None


def test_early_termination_goes_by_the_metric(tmp_path: Path) -> None:
    text = "method: grid\nparameters: {optim.lr: {value: 1}}\nmetric: {name: val/loss, goal: minimize}\n"
    text += "early_terminate: {type: hyperband, min_iter: 2}"
    hyperband = read_sweep(written(tmp_path, text)).hyperband
    assert hyperband is not None and hyperband.brackets[:2] == (2, 6) and not hyperband.maximize


ONE = "method: grid\nparameters: {optim.lr: {value: 1}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE + "metric: {name: accuracy}", "accuracy is no number of a validation, such as val/accuracy"),
        (ONE + "metric: {name: val/accuracy}", "needs `goal: maximize`"),
        (ONE + "metric: {name: val/loss, goal: max}", "goal must be minimize or maximize, not max"),
        (ONE + "metric: val/loss", "metric needs a name"),
        (ONE + "early_terminate: {type: hyperband, min_iter: 2}", "early_terminate needs `metric`"),
        (ONE + "metric: {name: val/loss}\nearly_terminate: {type: median}", "type: hyperband"),
        ("method: grid\nparameters: {optim: {values: [sgd]}}", "optim is a section"),
        ("method: grid\nparameters: {optim: {values: [{rl: 1}]}}", "optim.rl is no setting .*Did you mean optim.lr"),
        ("method: grid\nparameters: {optim: {values: [{lr: x}]}}", "optim.lr=x: expected a number"),
        ("method: grid\nparameters: {optim: {parameters: {rl: {value: 1}}}}", "optim.rl is no setting"),
        ("method: grid\nparameters: {optim: {parameters: 5}}", "optim has no parameters"),
        ("method: grid\nparameters: {optim: {values: [{lr: 1}]}, optim.lr: {value: 2}}", "optim.lr is set by two"),
        ("method: grid\nparameters: {optim.lr: {values: [1, 1.0]}}", "optim.lr has a value twice"),
        ("method: grid\nparameters: {run.seed: {min: 1, max: 100000000}}", "100000000 tasks are too many"),
        (
            "method: grid\nparameters: {optim.lr: {distribution: q_uniform, min: 0, max: 1, q: 1e-9}}",
            "1000000000 values are too many",
        ),
        ("method: random\nrun_cap: yes\nparameters: {optim.lr: {min: 0.1, max: 1.0}}", "needs `run_cap`"),
        ("method: random\nrun_cap: 3\nparameters: {train.epochs: {min: 1.0, max: 3.0}}", "epochs=.*a whole number"),
    ],
)
def test_what_a_file_may_not_say_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_sweep(written(tmp_path, text))
    assert str(refusal.value).startswith(f"{tmp_path / 'sweep.yaml'}: ") and "\n" not in str(refusal.value)


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


@pytest.mark.parametrize("path", [path for path in FILES if "method: grid" in path.read_text()], ids=lambda p: p.name)
def test_wandbs_agent_starts_the_same_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section's values reach train.py as `--optim={'name': 'sgd', 'lr': 0.1}`, nothing as `None`."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    monkeypatch.chdir(ROOT)
    sweep = read_sweep(path)
    parameters: dict[str, Any] = yaml.safe_load(path.read_text())["parameters"]
    theirs = []
    for values in itertools.product(*(given.get("values", [given.get("value")]) for given in parameters.values())):
        args = {name: {"value": value} for name, value in zip(parameters, values, strict=True)}
        theirs.append(parse_config([*sweep.arguments, *create_sweep_command_args({"args": args})["args"]]).run.name)
    assert theirs == [parse_config(sweep.arguments_of(index)).run.name for index in range(len(sweep.tasks))]


GRID = "parameters: {optim.lr: {values: [0.1, 0.2, 0.3]}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: gird", "method gird is none of W&B's: grid or random .* did you mean grid"),
        ("name: x", "there is no method: grid or random"),
        ("method: grid\nrun_capp: 3", "run_capp is no key of a sweep file. did you mean run_cap"),
        ("method: grid\nrun_cap: many", "run_cap must be a whole number from 1 on, not many"),
        ("method: grid\nmetric: {name: val/acuracy, goal: maximize}", "val/acuracy is no .* did you mean val/accuracy"),
    ],
)
def test_slips_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?i){message}"):
        read_sweep(written(tmp_path, f"{text}\n{GRID}"))


def test_run_cap_cuts_a_grid_as_wandb_does(tmp_path: Path) -> None:
    assert len(read_sweep(written(tmp_path, f"method: grid\nrun_cap: 2\n{GRID}")).tasks) == 2
