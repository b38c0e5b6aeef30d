"""Going on from a finished run: longer, as if it had been long from the start, or as a new run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import QUICK
from safetensors.torch import load_file

from lockstep.errors import UserError
from lockstep.run.history import is_speed, read_history

SHORT = (
    *QUICK,
    "--train.best_from_epoch=1",
    "--model.name=tiny_cnn",
    "--schedule.warmup_epochs=0.5",
    "--train.ema_decay=0.9",
)


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = read_history(run)
    return [{key: value for key, value in line.items() if not is_speed(key)} for line in lines]


def same_files(a: Path, b: Path, name: str) -> bool:
    return (a / "checkpoints/last" / name).read_bytes() == (b / "checkpoints/last" / name).read_bytes()


@pytest.mark.slow
def test_a_run_made_longer_is_the_one_that_was_long_from_the_start(train_here: Any, capsys: Any) -> None:
    settings = (*SHORT, "--schedule.name=plateau")
    long = train_here(*settings, "--train.epochs=4", "--run.name=long")
    train_here(*settings, "--train.epochs=2", "--run.name=grown")
    capsys.readouterr()
    grown = train_here(*settings, "--train.epochs=4", "--run.name=grown")
    assert "runs/grown is made longer: from 2 to 4 epochs" in capsys.readouterr().out
    assert lines_of(grown) == lines_of(long)
    assert all(same_files(long, grown, f"{name}.safetensors") for name in ("model", "ema"))
    assert json.loads((grown / "summary.json").read_text())["epochs"] == 4
    with pytest.raises(UserError, match=r"other settings \(train.epochs: 4 -> 2\)"):
        train_here(*settings, "--train.epochs=2", "--run.name=grown")


@pytest.mark.slow
def test_a_run_without_validations_is_made_longer(train_here: Any) -> None:
    settings = (
        *SHORT,
        "--schedule.name=constant",
        "--data.val_fraction=0",
        "--train.validate_every_epochs=3",
        "--log.figures=false",
    )
    long = train_here(*settings, "--train.epochs=4", "--run.name=long")
    train_here(*settings, "--train.epochs=2", "--run.name=grown")
    grown = train_here(*settings, "--train.epochs=4", "--run.name=grown")
    assert lines_of(grown) == lines_of(long) and same_files(long, grown, "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])  # which count steps by weight, and by group
def test_a_new_run_begins_with_weights_average_and_optimizer_of_another(
    optimizer: str, train_here: Any, capsys: Any
) -> None:
    first = train_here(*SHORT, f"--optim.name={optimizer}", "--run.name=first")
    still = ("--optim.lr=1e-12", "--schedule.name=constant", "--optim.weight_decay=0", "--train.ema_decay=0.99999999")
    more = (*SHORT, "--run.from_run=runs/first", f"--optim.name={optimizer}", *still, "--run.name=second")
    second = train_here(*more)
    assert "beginning with the weights, average and optimizer of runs/first, step_00000010" in capsys.readouterr().out
    for file in ("model", "ema"):
        before, after = (load_file(run / f"checkpoints/last/{file}.safetensors") for run in (first, second))
        weights = [name for name in before if "running" not in name]
        assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-6) for name in weights), file
    old, new = (torch.load(run / "checkpoints/last/optimizer.pt")["optimizer"] for run in (first, second))
    counters = new["state"].values() if optimizer == "adamw" else new["param_groups"]
    assert {float(counter["step"]) for counter in counters} == {20.0} and new["state"].keys() == old["state"].keys()
    assert {group["lr"] for group in new["param_groups"]} == {1e-12}
    summary = json.loads((second / "summary.json").read_text())
    assert summary["origin"]["run"] == "runs/first" and summary["origin"]["checkpoint"] == "step_00000010"
    assert summary["steps"] == 10 and read_history(second)[0]["step"] == 2

    with pytest.raises(UserError, match=f"brings the state of --optim.name={optimizer}, not of sgd: set that"):
        train_here(*SHORT, "--run.from_run=runs/first", "--optim.name=sgd", "--run.name=other")

    # Begun, killed before its first checkpoint, and the other run has gone on meanwhile.
    shutil.rmtree(second / "checkpoints")
    (second / "summary.json").write_text(json.dumps({**summary, "state": "running"}))
    shutil.rmtree(first / "checkpoints" / "step_00000010")
    with pytest.raises(UserError, match="began with step_00000010 of runs/first, whose newest checkpoint is another"):
        train_here(*more)


def test_what_cannot_be_gone_on_from_is_one_line(train_here: Any, tmp_path: Path) -> None:
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--run.from_run=runs/none: there is no run"):
        train_here(*SHORT, "--run.from_run=runs/none", "--run.name=new")
    (tmp_path / "runs" / "empty" / "config.yaml").write_text("run: {}")
    with pytest.raises(UserError, match="that run has no checkpoint yet"):
        train_here(*SHORT, "--run.from_run=runs/empty", "--run.name=new")
    assert not (tmp_path / "runs" / "new").exists()
