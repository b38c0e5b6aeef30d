"""Many runs side by side: what is read, which runs are a group and what it is called, means and curves by hand."""

import math
from pathlib import Path

import pytest
from folders import finished, lines, write_run

from lockstep.errors import UserError
from lockstep.report.comparison import group_runs, paired_test, read_runs


def test_runs_that_differ_in_nothing_but_the_seed_are_a_group(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"{lr} {seed}", finished(0.9), [], optim__lr=lr, run__seed=seed, log__project=f"{seed}")
        for seed in (1, 0)
        for lr in (0.1, 0.01)
    ]
    groups = group_runs(read_runs(paths))
    assert [group.label for group in groups] == ["optim.lr=0.1", "optim.lr=0.01"]
    assert [[run.name for run in group.runs] for group in groups] == [["0.1 1", "0.1 0"], ["0.01 1", "0.01 0"]]
    assert groups[0].seeds == [0, 1] and groups[0].settings == {"optim.lr": 0.1}


def test_labels_hold_what_differs_or_names_where_that_is_much(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", None, [], augment__flip=True, augment__jitter=(0.2, 0.1), model__dropout=0.5)
    two = write_run(tmp_path / "two", None, [])
    groups = group_runs(read_runs([one, two]))
    assert [group.label for group in groups] == [
        "augment.flip=true augment.jitter=[0.2,0.1] model.dropout=0.5",
        "augment.flip=false augment.jitter=[] model.dropout=null",
    ]
    assert [group.label for group in group_runs(read_runs([one]))] == ["one"]
    far = write_run(tmp_path / "elsewhere" / "two", None, [], data__source="folder:" + "x" * 80)
    assert [group.label for group in group_runs(read_runs([one, two, far]))] == ["one", str(two), str(far)]


def test_groups_by_a_setting_of_choice(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"{lr} {dropout}", finished(lr + dropout), [], optim__lr=lr, model__dropout=dropout)
        for lr in (0.1, 0.2)
        for dropout in (0.0, 0.5)
    ]
    runs = read_runs(paths)
    groups = group_runs(runs, by=["model.dropout"])
    assert [group.label for group in groups] == ["model.dropout=0.0", "model.dropout=0.5"]
    assert groups[1].values(lambda run: run.number("test_accuracy")) == {0: pytest.approx(0.65)}
    with pytest.raises(UserError, match="model.dropuot is no setting .* Did you mean model.dropout"):
        group_runs(runs, by=["model.dropuot"])


def test_a_training_that_was_repeated_counts_once_and_half_a_training_not_at_all(tmp_path: Path) -> None:
    half = write_run(tmp_path / "half", {"state": "preempted"}, lines([0.2]), run__seed=2)
    first = write_run(tmp_path / "first", None, lines([0.1]), run__seed=0)
    again = write_run(tmp_path / "again", finished(0.8), [], run__seed=0)
    other = write_run(tmp_path / "other", finished(0.9), [], run__seed=1)
    (group,) = group_runs(read_runs([half, first, again, other]))
    assert [run.name for run in group.trainings] == ["half", "again", "other"]
    assert group.values(lambda run: run.best_val_accuracy) == {0: 0.8, 1: 0.9}
    (alone,) = group_runs(read_runs([half]))
    assert alone.values(lambda run: run.best_val_accuracy) == {2: 0.2}


def test_curves_are_means_over_seeds_at_every_epoch_that_one_has(tmp_path: Path) -> None:
    long = write_run(tmp_path / "long", finished(0.5), lines([0.2, 0.4, 0.6]), run__seed=0)
    short = write_run(tmp_path / "short", finished(0.5), lines([0.4, math.nan]), run__seed=1)
    group = group_runs(read_runs([long, short]))[0]
    curve = group.curve("val", "accuracy")
    assert curve.epochs.tolist() == [1, 2, 3]
    assert curve.mean.tolist() == pytest.approx([0.3, 0.4, 0.6])
    assert (curve.low.tolist(), curve.high.tolist()) == ([0.2, 0.4, 0.6], [0.4, 0.4, 0.6])
    assert not len(group.curve("val", "no such metric").epochs)


def test_what_is_absent_or_damaged_is_not_a_number(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", None, [{"step": 5, "epoch": "x", "split": "val", "accuracy": "y"}])
    for text in ("", "[]", "{", '{"state": "finished", "test_accuracy": null, "wall_seconds": "NaN"}'):
        (path / "summary.json").write_text(text)
        (run,) = read_runs([path])
        assert run.state == ("finished" if "state" in text else "unknown")
        numbers = [run.number("test_accuracy"), run.best_val_accuracy, run.epochs, run.process_hours]
        assert all(map(math.isnan, numbers))


def test_cost_is_wall_time_of_all_processes(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", finished(0.5, wall_seconds=1800), [])])
    assert run.process_hours == 1.0


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no run in {tmp_path}: it has no config.yaml"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="there is no run in nowhere$"):
        read_runs([Path("nowhere")])


def test_a_paired_test_by_hand() -> None:
    """Differences 1, 2 and 3: mean 2, deviation 1, t = 2 sqrt(3); with 2 degrees P = 1 - t / sqrt(2 + t²)."""
    test = paired_test({0: 10.0, 1: 10.0, 2: 10.0, 7: 99.0}, {2: 13.0, 1: 12.0, 0: 11.0, 8: 99.0})
    t = 2 * math.sqrt(3)
    assert (test.pairs, test.difference) == (3, pytest.approx(2))
    assert test.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_a_paired_test_needs_two_pairs_and_some_spread() -> None:
    alone = paired_test({0: 0.5, 1: 0.5}, {1: 0.7, 2: 0.7})
    assert alone.pairs == 1 and math.isnan(alone.p)
    alike = paired_test({0: 0.1, 1: 0.2, 2: 0.3}, {0: 0.2, 1: 0.3, 2: 0.4})
    assert alike.difference == pytest.approx(0.1) and math.isnan(alike.p)
