"""Which run a command means: new, unfinished, finished, or somebody else's settings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.errors import UserError
from lockstep.launch.accelerator import Launch
from lockstep.run.folder import Run, difference_of_data, open_run
from lockstep.run.history import HISTORY
from lockstep.settings.config import Config, LogConfig, OptimConfig, RunConfig, TrainConfig
from lockstep.settings.yaml import load_config

LAUNCH = Launch(torch.device("cpu"), num_processes=1, process_index=0, local_process_index=0, precision="no", cores=1)


def config_in(root: Path, **run: Any) -> Config:
    return Config(run=RunConfig(name="digits", root=str(root), **run))


def opened(config: Config) -> Run:
    return open_run(config, LAUNCH)


def folder_contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def begun(tmp_path: Path) -> Run:
    """A run that was started and killed at once."""
    run = opened(config_in(tmp_path))
    run.create(micro_batch_size=64, threads=1)
    return run


def test_a_new_run_is_empty_and_opening_it_writes_nothing(tmp_path: Path) -> None:
    run = opened(config_in(tmp_path / "runs"))
    assert run.path == tmp_path / "runs" / "digits" and run.checkpoints == run.path / "checkpoints"
    assert run.summary == {} and not run.is_finished and not run.has_checkpoint
    assert list(tmp_path.iterdir()) == []


def test_create_writes_settings_that_load_as_an_equal_config(begun: Run) -> None:
    assert load_config(begun.path / "config.yaml") == begun.config
    begun.create(micro_batch_size=64, threads=1)  # a restart creates again
    assert load_config(begun.path / "config.yaml") == begun.config


def test_an_unfinished_run_goes_on(begun: Run) -> None:
    begun.write_summary(state="running", restarts=1)
    again = opened(begun.config)
    assert again.path == begun.path and again.summary == begun.summary | {
        "state": "running",
        "micro_batch_size": 64,
        "threads": 1,
        "restarts": 1,
    }
    assert not again.is_finished and not again.has_checkpoint
    (begun.checkpoints / "step_00000010").mkdir(parents=True)
    (begun.checkpoints / "last").symlink_to("step_00000010")
    assert again.has_checkpoint


@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
def test_only_a_finished_run_is_finished(begun: Run, state: str) -> None:
    begun.write_summary(state=state)
    assert not opened(begun.config).is_finished


def test_a_finished_run_tells_its_result_and_how_to_start_over(begun: Run) -> None:
    begun.write_summary(state="finished", best_val_accuracy=0.98765, test_accuracy=0.5, images_per_second=10.0)
    run = opened(begun.config)
    assert run.is_finished
    line = run.describe_result()
    assert str(run.path) in line and "98.77%" in line and "test accuracy 50.00%" in line and "10" not in line[-60:]
    assert "--run.name" in line and "--run.seed" in line and "\n" not in line


def test_other_settings_are_refused_with_the_changed_keys_and_the_way_out(begun: Run) -> None:
    other = replace(begun.config, optim=OptimConfig(lr=0.5, l1=0.1), train=TrainConfig(epochs=3))
    before = folder_contents(begun.path)
    with pytest.raises(ValueError) as refusal:
        opened(other)
    message = str(refusal.value)
    for part in (str(begun.path), "optim.lr: 0.001 -> 0.5", "optim.l1: 0.0 -> 0.1", "train.epochs: 10 -> 3"):
        assert part in message
    assert "--run.name" in message and "remove the folder" in message and "\n" not in message
    assert "optim.name" not in message, "unchanged settings only hide the changed ones"
    assert folder_contents(begun.path) == before


def with_epochs(config: Config, epochs: int, **schedule: Any) -> Config:
    train, shape = replace(config.train, epochs=epochs), replace(config.schedule, **schedule)
    return replace(config, train=train, schedule=shape)


@pytest.mark.parametrize("name", ["constant", "step", "exponential", "plateau", "cosine_restarts"])
def test_more_epochs_make_a_run_longer(name: str, tmp_path: Path) -> None:
    config = with_epochs(config_in(tmp_path), 4, name=name)
    open_run(config, LAUNCH).create()
    open_run(config, LAUNCH).write_summary(state="finished")
    assert open_run(config, LAUNCH).is_finished
    longer = open_run(with_epochs(config, 6, name=name), LAUNCH)
    assert longer.old_epochs == 4 and not longer.is_finished


@pytest.mark.parametrize(
    ("train", "schedule", "cause"),
    [
        ({}, {"name": "cosine"}, "lays its learning rates out over all epochs"),
        ({}, {"name": "onecycle"}, "lays its learning rates out over all epochs"),
        ({}, {"name": "cosine_restarts", "cooldown_epochs": 0.001}, "lays its learning rates out over all epochs"),
        ({"max_steps": 3}, {}, "it ends with --train.max_steps=3"),
        ({"best_from_epoch": 5}, {}, "its end counted as the best before epoch 5"),
        ({"validate_every_epochs": 3}, {}, "its last validation, after epoch 4, would not have been one"),
    ],
)
def test_a_run_is_not_made_longer_where_its_past_would_change(
    train: dict[str, Any], schedule: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    config = with_epochs(config_in(tmp_path), 4, **schedule)
    config = replace(config, train=replace(config.train, **train))
    run = opened(config)
    run.create()
    (run.path / HISTORY).write_text('{"split": "val", "epoch": 4}\n')
    with pytest.raises(
        UserError, match=f"cannot be made longer, from 4 to 6 epochs, for .*{cause}.*: go on .*--run.from_run="
    ):
        open_run(with_epochs(config, 6), LAUNCH)


@pytest.mark.parametrize("train", [{"best_from_epoch": 5}, {"validate_every_epochs": 3}])
def test_what_was_never_validated_can_be_made_longer(train: dict[str, Any], tmp_path: Path) -> None:
    config = with_epochs(config_in(tmp_path), 4)
    config = replace(config, train=replace(config.train, **train))
    run = opened(config)
    run.create()
    (run.path / HISTORY).write_text('{"split": "train", "epoch": 4}\n{"split": "val", "epoch": 3}\n')
    assert opened(with_epochs(config, 6)).old_epochs == 4


def test_more_epochs_with_other_changes_are_another_run(tmp_path: Path) -> None:
    config = with_epochs(config_in(tmp_path), 4)
    open_run(config, LAUNCH).create()
    other = with_epochs(config, 6)
    with pytest.raises(UserError, match="other settings"):
        open_run(replace(other, optim=replace(other.optim, lr=0.5)), LAUNCH)


def test_settings_that_do_not_shape_the_result_may_change(begun: Run) -> None:
    watched = replace(begun.config, log=LogConfig(every_steps=1, wandb="disabled"))
    watched = replace(watched, run=replace(watched.run, notes="again", max_hours=1.0))
    assert opened(watched).config == watched


def test_tuples_do_not_look_changed_after_a_reload(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config = replace(config, augment=replace(config.augment, jitter=(0.1, 0.2), mean=(0.5,), std=(0.25,)))
    opened(config).create(micro_batch_size=64, threads=1)
    assert opened(config).path.is_dir()


def test_never_resume_refuses_what_exists(begun: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run\.resume=never.*digits.*--run\.name"):
        opened(config_in(tmp_path, resume="never"))
    assert opened(config_in(tmp_path / "elsewhere", resume="never")).summary == {}


def test_must_resume_refuses_what_is_missing(begun: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run\.resume=must.*elsewhere"):
        opened(config_in(tmp_path / "elsewhere", resume="must"))
    assert opened(config_in(tmp_path, resume="must")).path == begun.path


def test_settings_that_cannot_be_read_are_named(begun: Run) -> None:
    (begun.path / "config.yaml").write_text("optim: {lr: [")
    with pytest.raises(ValueError, match=r"digits/config\.yaml"):
        opened(begun.config)


def test_what_the_first_start_had_is_kept(begun: Run) -> None:
    """Another microbatch, or another number of CPU threads, would be another training."""
    again = opened(begun.config)
    again.create(micro_batch_size=32, threads=4)
    assert (again.micro_batch_size, again.threads) == (64, 1) == (opened(begun.config).micro_batch_size, again.threads)


def test_a_half_written_summary_does_not_stop_a_restart(begun: Run) -> None:
    (begun.path / "summary.json").write_text('{"state": "finis')
    assert opened(begun.config).summary == {}


def test_write_summary_merges(begun: Run) -> None:
    begun.write_summary(state="running", restarts=0)
    begun.write_summary(state="finished", test_accuracy=0.9)
    summary = json.loads((begun.path / "summary.json").read_text())
    assert summary == {"state": "finished", "micro_batch_size": 64, "threads": 1, "restarts": 0, "test_accuracy": 0.9}
    assert opened(begun.config).summary == summary
    assert begun.summary == {}, "a Run shows what was found when it was opened"


def test_a_run_goes_on_with_the_data_it_was_begun_with(tmp_path: Path) -> None:
    identity = {"content": "abc", "classes": 2, "train": 135, "test": 20}
    config = config_in(tmp_path)
    opened(config).require_same_data(identity, LAUNCH)  # a new run takes any
    opened(config).create(micro_batch_size=32, threads=1, data=identity)
    opened(config).require_same_data(dict(identity), LAUNCH)
    with pytest.raises(UserError, match=r"begun with other data \(content abc -> abd, train 135 -> 115\): bring"):
        opened(config).require_same_data({**identity, "content": "abd", "train": 115}, LAUNCH)


def test_an_evaluation_looks_at_the_data_of_the_training(tmp_path: Path) -> None:
    identity: dict[str, int | str] = {"content": "abc", "class_names": "cat dog", "classes": 2}
    config = config_in(tmp_path)
    run = opened(config)
    run.create(micro_batch_size=32, threads=1, data=identity)
    assert difference_of_data(run.path, config, identity) is None
    renamed = {**identity, "class_names": "dog zebra"}
    with pytest.raises(
        UserError, match="embedded:digits has changed since .* was trained .class_names cat dog -> dog z"
    ):
        difference_of_data(run.path, config, renamed)
    other = replace(config, data=replace(config.data, source="folder:elsewhere"))
    assert "other class names" in str(difference_of_data(run.path, other, renamed))
    assert difference_of_data(run.path, other, {**identity, "content": "abd"}) is None
    assert difference_of_data(tmp_path / "no run", config, renamed) is None
