"""lockstep compare: up to where two histories are equal, what counts as a difference, and the exit code.

And of many runs: groups, means, a paired test, digests, the files that are written, all by hand-made run folders.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import folders
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from folders import finished, lines
from safetensors.torch import save_file

from lockstep.commands.compare import main, relative_differences
from lockstep.errors import UserError
from lockstep.run.history import compare_histories
from lockstep.settings.config import Config, LogConfig, OptimConfig
from lockstep.settings.yaml import config_to_yaml

NUMERICS = {"device": "some CPU", "threads": 2, "exact": True}


def write_run(folder: Path, change: float = 0.0, name: str = "layer.weight") -> str:
    checkpoint = folder / "checkpoints" / "last"
    checkpoint.mkdir(parents=True)
    weights = {name: torch.tensor([1.0, -4.0 - change], dtype=torch.float64), "steps": torch.tensor(3)}
    save_file(weights, checkpoint / "model.safetensors")
    return str(folder)


def history(digests: str, **more: Any) -> list[dict[str, Any]]:
    """A training line for every letter, 10 steps apart, and a validation at the end."""
    lines = [
        {"split": "train", "step": 10 * number, "loss": 0.5, "digest": letter, "images_per_second": number}
        for number, letter in enumerate(digests, 1)
    ]
    return [*lines, {"split": "val", "step": 10 * len(digests), "loss": 0.4, **more}]


def write_history(run: str, digests: str, *numerics: dict[str, Any]) -> None:
    (Path(run) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history(digests)))
    (Path(run) / "environment.json").write_text(
        json.dumps([{"numerics": start, "step": 10 * i} for i, start in enumerate(numerics)])
    )


def test_histories_are_equal_through_the_last_line_before_one_that_differs() -> None:
    same, other = history("abc"), history("abd")
    other[0]["images_per_second"] = 1e9  # speeds are no part of it
    assert compare_histories(same, same) == "equal to the last bit through step 30"
    assert compare_histories(same, other) == (
        "equal to the last bit through step 20; the train line of step 30 has digest c in one, d in the other"
    )
    assert compare_histories(same, history("xyz")).startswith("not equal; the train line of step 10")
    assert compare_histories(same, history("ab")) == "equal to the last bit through step 20"
    assert "step 30 has loss 0.4 in one, 0.3 in the other" in compare_histories(same, history("abc", loss=0.3))


def test_without_digests_nothing_is_claimed() -> None:
    lines = [{key: value for key, value in line.items() if key != "digest"} for line in history("abc")]
    assert "nothing can be said" in compare_histories(lines, lines)
    assert "nothing can be said" in compare_histories(history("abc"), [])


def test_runs_that_part_are_told_with_their_numerics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    write_history(a, "abc", NUMERICS)
    write_history(b, "abd", {**NUMERICS, "threads": 1}, {**NUMERICS, "threads": 1, "exact": False})
    main([a, b])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("equal to the last bit through step 20; the train line of step 30")
    assert lines[1] == f"numerics: threads 2 -> 1; changed after step 10 of {b}: exact True -> False"
    write_history(b, "abd", NUMERICS)
    main([a, b])
    assert "numerics are the same" in capsys.readouterr().out
    write_history(b, "abc", NUMERICS)
    main([a, b])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "equal to the last bit through step 30" and "numerics" not in lines[1]


def test_difference_is_relative_to_the_largest_weight_of_the_layer() -> None:
    a, b = {"w": torch.tensor([1.0, -4.0])}, {"w": torch.tensor([1.0, -4.5])}
    assert relative_differences(a, b) == {"w": 0.125}
    assert relative_differences(a, a) == {"w": 0.0}
    assert relative_differences({"w": torch.zeros(2)}, {"w": torch.ones(2)}) == {"w": float("inf")}
    # A running mean that is nothing but rounding is no difference beside its layer's other numbers.
    tiny = {"bn.running_mean": torch.tensor([9e-18]), "bn.running_var": torch.tensor([1.0])}
    assert relative_differences(tiny, {**tiny, "bn.running_mean": torch.tensor([8e-18])})["bn.running_mean"] < 1e-17


def test_a_count_counts_for_itself() -> None:
    a = {"bn.weight": torch.tensor([1000.0]), "bn.num_batches_tracked": torch.tensor(2)}
    b = {**a, "bn.num_batches_tracked": torch.tensor(3)}
    assert relative_differences(a, b)["bn.num_batches_tracked"] == 0.5


def test_other_names_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different networks.*v"):
        relative_differences({"w": torch.ones(1)}, {"v": torch.ones(1)})
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        relative_differences({"w": torch.ones(1)}, {"w": torch.ones(2)})


def test_exit_code_follows_the_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", change=4e-9)
    assert main([a, a]) == 0
    assert "bit for bit equal" in capsys.readouterr().out
    assert main([a, b]) == 1
    assert "1e-09 (layer.weight); ABOVE" in capsys.readouterr().out
    assert main([a, b, "--tolerance", "1e-8", "--per_tensor"]) == 0
    assert "steps" in capsys.readouterr().out


def test_not_a_number_never_passes(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", change=float("nan"))
    assert main([a, b, "--tolerance", "1e9"]) == 1
    assert main([b, b, "--tolerance", "1e9"]) == 1


def test_averages_are_compared_too(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for run, value in ((a, 1.0), (b, 2.0)):
        save_file({"w": torch.tensor([value])}, Path(run) / "checkpoints/last/ema.safetensors")
    assert main([a, b]) == 1


def test_other_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for run, lr in ((a, 0.1), (b, 0.2)):
        config = Config(optim=OptimConfig(lr=lr), log=LogConfig(project=run))
        (Path(run) / "config.yaml").write_text(config_to_yaml(config))
    assert main([a, b]) == 0
    assert "note: other settings: optim.lr: 0.1 -> 0.2" in capsys.readouterr().out.splitlines()
    assert main([a, a]) == 0
    assert "note" not in capsys.readouterr().out


def test_a_chain_of_digests_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/reference has some: no weights, and the exit code follows the digests."""
    run, chain = write_run(tmp_path / "run"), str(tmp_path / "chain")
    Path(chain).mkdir()
    write_history(run, "abc", NUMERICS)
    for digests, code in (("abc", 0), ("abd", 1)):
        write_history(chain, digests, NUMERICS)
        assert main([run, chain]) == code
    assert f"weights are not compared: {chain} has no checkpoints" in capsys.readouterr().out


# ---- Any number of runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two learning rates with three seeds each; the last run of the second has been stopped after an epoch."""
    for lr, accuracies in ((0.1, (0.90, 0.92, 0.94)), (0.2, (0.91, 0.95, None))):
        for seed, accuracy in enumerate(accuracies):
            summary = finished(accuracy) if accuracy else {"state": "preempted", "steps": 10, "epochs": 1}
            run = tmp_path / "runs" / f"lr{lr}-{seed}"
            folders.write_run(run, summary, lines([0.5, accuracy or 0.6], lr=lr), optim__lr=lr, run__seed=seed)
    return tmp_path / "runs"


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of the printed table whose title begins so."""
    (table,) = [part for part in text.split("\n\n") if part.startswith(title)]
    return [re.split(r"  +", line.strip()) for line in table.splitlines()[2:]]


def test_many_runs_become_a_table_of_groups(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep)]) == 0
    text = capsys.readouterr().out
    first, second = rows(text, "Groups")
    assert first[:6] == ["1", "optim.lr=0.1", "finished", "3", "92.00% ± 2.00%", "92.00% ± 2.00%"]
    assert first[6:] == ["0.0800 ± 0.0200", "2", "1,000 ± 0", "1,700.0 ± 0.0", "1 ± 0"]
    # Half a training counts in no mean: (91 + 95) / 2, and a deviation of 4 / sqrt(2).
    assert second[2:6] == ["2 finished, 1 preempted", "2 of 3", "93.00% ± 2.83%", "93.00% ± 2.83%"]
    assert rows(text, "Settings that differ") == [["optim.lr", "0.1", "0.2"]]
    # Differences of 1 and 3 points: mean 2, t = 2 / (sqrt(2) / sqrt(2)) = 2, and P(|t| > 2) with 1 degree is 0.295.
    assert rows(text, "Paired t-test") == [["2", "optim.lr=0.2", "2", "+2.00 points", "0.295"]]
    assert "Runs of one training" not in text


def test_a_run_that_is_alone_or_only_begun_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = folders.write_run(tmp_path / "be\ngun", None, [])
    assert main([str(begun)]) == 0
    text = capsys.readouterr().out
    assert rows(text, "Groups") == [["1", "be?gun", "unknown", "1", "-", "-", "-", "-", "-", "-", "-"]]
    assert "\n\n" not in text.strip()
    other = folders.write_run(tmp_path / "other", {"state": "running"}, [], optim__lr=0.5)
    assert main([str(begun), str(other)]) == 0  # of two, weights would be compared
    text = capsys.readouterr().out
    assert "Paired t-test" not in text  # it needs two seeds
    assert f"weights are not compared: {begun} has no checkpoints" in text


def test_runs_of_one_training_are_compared_by_their_digests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, digests, seed in (("a", "abc", 0), ("b", "abd", 0), ("c", "abc", 0), ("d", "xyz", 1)):
        folders.write_run(tmp_path / name, finished(0.9), lines([0.5, 0.6, 0.7], digests), run__seed=seed)
    assert main([str(tmp_path / "*")]) == 0
    text = capsys.readouterr().out
    (group,) = rows(text, "Groups")
    assert group[1:4] == ["a", "finished", "2"]
    parted, equal = rows(text, "Runs of one training")
    assert parted[:2] == ["b", "a"] and parted[2].startswith("equal to the last bit through step 20; the train line of")
    assert equal == ["c", "a", "equal to the last bit through step 30"]


def test_two_runs_have_their_table_before_their_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [folders.write_run(tmp_path / name, finished(0.9), lines([0.5, 0.6], "ab")) for name in "xy"]
    for run in pair:
        save_file({"w": torch.ones(2)}, (run / "model.safetensors"))
    assert main([str(tmp_path)]) == 0
    table, bits = capsys.readouterr().out.rsplit("\n\n", 1)
    assert table.startswith("Groups") and "bit for bit equal" in bits


def test_globs_and_folders_are_expanded_and_a_run_is_taken_once(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "notes").mkdir()
    assert main([str(sweep / "lr0.1*"), str(sweep / "lr0.1-0"), str(sweep)]) == 0
    assert [row[3] for row in rows(capsys.readouterr().out, "Groups")] == ["3", "2 of 3"]
    main([str(sweep / "*")])
    noted = capsys.readouterr()
    assert noted.err == f"note: left out: there is no run in {sweep / 'notes'}: it has no config.yaml\n"
    assert len(rows(noted.out, "Groups")) == 2


def test_what_is_no_run_is_told_in_a_line(sweep: Path, tmp_path: Path) -> None:
    some = [str(sweep / name) for name in ("lr0.1-0", "lr0.1-1")]
    for wrong in ("nowhere", str(tmp_path / "no*where")):
        with pytest.raises(UserError, match=f"^there is no run in {re.escape(wrong)}$"):
            main([*some, wrong])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no run in .*empty: it has no config.yaml"):
        main([*some, str(tmp_path / "empty")])
    with pytest.raises(UserError, match="two runs with a config.yaml"):
        main([some[0], str(tmp_path / "empty"), "--csv", str(tmp_path / "x.csv")])
    (Path(some[0]) / "config.yaml").write_text("optim: {lr: fast}")
    with pytest.raises(UserError, match=r"lr0.1-0/config.yaml: .*optim.lr"):
        main([*some, str(sweep / "lr0.2-0")])
    assert main([str(sweep)]) == 0  # not named, so left out


def test_groups_by_one_setting(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep), "--by", "run.seed"]) == 0
    text = capsys.readouterr().out
    assert [row[1] for row in rows(text, "Groups")] == ["run.seed=0", "run.seed=1", "run.seed=2"]
    assert rows(text, "Settings that differ") == [["optim.lr", "0.1 or 0.2", "0.1 or 0.2", "0.1 or 0.2"]]


def test_csv_has_a_row_per_run_with_plain_numbers(sweep: Path, tmp_path: Path) -> None:
    assert main([str(sweep), "--csv", str(tmp_path / "out" / "runs.csv")]) == 0
    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table][:2] == ["lr0.1-0", "lr0.1-1"] and len(table) == 6
    first, stopped = table[0], table[5]
    numbers = {"test_accuracy": "0.9", "test_loss": "0.1", "processes": "2", "process_hours": "1", "optim.lr": "0.1"}
    texts = {"run.seed": "0", "state": "finished", "path": str(sweep / "lr0.1-0"), "device": "cpu", "epochs": "2"}
    assert first.items() >= (numbers | texts).items()
    assert (stopped["state"], stopped["test_accuracy"], stopped["best_val_accuracy"]) == ("preempted", "", "0.6")


def test_the_figure_is_drawn_where_it_is_asked_for(sweep: Path, tmp_path: Path) -> None:
    main([str(sweep), "--figure", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "runs"]


# ---- Predictions of two runs -----------------------------------------------------------------------------------------


def predicted(folder: Path, right: list[int], samples: list[int] | None = None, data: str = "abc") -> str:
    """What eval.py leaves of samples that are all cats: 1 is taken for one, 0 for a dog."""
    columns = {
        "sample": samples or list(range(len(right))),
        "label": ["cat"] * len(right),
        "prediction": ["dog cat".split()[hit] for hit in right],
    }
    folder.mkdir()
    pq.write_table(pa.table(columns).replace_schema_metadata({"data": data}), folder / "predictions_test.parquet")
    return str(folder)


def test_two_runs_are_compared_sample_by_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = predicted(tmp_path / "a", [1, 1, 1, 1, 0, 0, 0, 0, 1, 1])
    b = predicted(tmp_path / "b", [1, 1, 0, 1, 1, 1, 1, 0, 1, 1][::-1], samples=list(range(9, -1, -1)))
    assert main(["--predictions", a, b]) == 0
    count, first, second, difference = capsys.readouterr().out.splitlines()
    assert count == "10 samples of the test split"
    assert first == f"{a}  accuracy 60.00%  alone right on 1"
    assert second == f"{b}  accuracy 80.00%  alone right on 3"
    assert difference.startswith("difference +20.00 points, 95 % interval -20.00 to +60.00 (paired")
    assert difference.endswith("McNemar's exact test: p = 0.625")


def test_predictions_of_other_samples_are_refused(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(UserError) as caught:
            main([*arguments, "--predictions"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    a = predicted(tmp_path / "a", [1, 0, 1])
    assert "3 and 2 samples, 2 of them in both" in refused(a, predicted(tmp_path / "fewer", [1, 0]))
    assert "2 of them in both" in refused(a, predicted(tmp_path / "moved", [1, 0, 1], samples=[0, 1, 5]))
    assert "content abc and xyz" in refused(a, predicted(tmp_path / "other", [1, 0, 1], data="xyz"))
    renamed = tmp_path / "renamed"
    predicted(renamed, [1, 0, 1])
    table = pq.read_table(renamed / "predictions_test.parquet")
    changed = table.set_column(1, "label", pa.array(["cat", "dog", "cat"]))
    pq.write_table(changed, renamed / "predictions_test.parquet")
    assert "sample 1 is cat in one, dog in the other" in refused(a, str(renamed))
    assert "eval.py --run" in refused(a, str(tmp_path / "nowhere"))
    (renamed / "predictions_test.parquet").write_text("not a table")
    assert "is damaged" in refused(a, str(renamed))
    pq.write_table(pa.table({"sample": [1]}), renamed / "predictions_test.parquet")
    assert "is damaged" in refused(a, str(renamed))
    assert "eval.py --run" in refused(a, a, "--split=val")
    assert "two folders, not 1" in refused(a)
