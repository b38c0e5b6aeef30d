"""The command: the tasks of a sweep file, train.py for one of them, and all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import QUICK, ROOT, environment

from lockstep.commands.sweep import main
from lockstep.errors import UsageError
from lockstep.launch.threads import owned_cores


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml does not exist"):
        main(["list", str(tmp_path / "none.yaml")])


def run_sweep(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lockstep", "sweep", *arguments]
    surroundings = {key: value for key, value in environment(**extra).items() if not key.startswith("SLURM_")} | extra
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=300)


def test_list_prints_a_line_per_task() -> None:
    done = run_sweep("list", "configs/sweeps/digits_grid.yaml")
    assert done.stdout.splitlines()[3] == "3: --optim.lr=0.003 --model.dropout=0.2"
    assert "sbatch --array=0-5 slurm/array_sweep.sbatch configs/sweeps/digits_grid.yaml" in done.stderr


def test_run_is_train_with_the_tasks_settings() -> None:
    more = ("--config", "configs/cifar10_cnn.yaml", "--train.epochs=2")
    done = run_sweep("run", "configs/sweeps/digits_grid.yaml", "3", *more, "--print_config", SLURM_ARRAY_JOB_ID="17")
    assert done.returncode == 0, done.stderr
    for line in ("lr: 0.003", "dropout: 0.2", "epochs: 2", "group: '17'", "source: torchvision:CIFAR10"):
        assert f"  {line}" in done.stdout, line
    folder = run_sweep("run", "configs/sweeps/digits_grid.yaml", "3", *more, "--print_run_dir").stdout.strip()
    assert os.path.dirname(folder) == "runs" and os.path.basename(folder).startswith("cifar10_cnn-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["6"], "digits_grid.yaml has the tasks 0 to 5, not 6"),
        (["-1"], "has the tasks 0 to 5, not -1"),
        (["1", "--optim.lr=1"], "sets optim.lr for each task"),
        (["1", "--run.name=x"], "cannot share a run folder"),
        (["1", "--optim.lrr=1"], "unknown setting --optim.lrr"),
        (["--optim.lrr=1"], "unknown setting --optim.lrr"),
        (["--train.epochs=0"], "task 0 of configs/sweeps/digits_grid.yaml: --train.epochs=0 must be at least 1"),
        (["1", "--jobs", "2"], "--jobs and --processes are for all tasks"),
        (["--jobs", "0"], "0 is no whole number from 1 on"),
        (["--jobs", "two"], "two is no whole number from 1 on"),
    ],
)
def test_run_refuses(arguments: list[str], message: str) -> None:
    done = run_sweep("run", "configs/sweeps/digits_grid.yaml", *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_launcher_of_several_processes_is_refused() -> None:
    """Each of them would train every task."""
    done = run_sweep("run", "configs/sweeps/digits_grid.yaml", WORLD_SIZE="2")
    assert done.returncode == 2 and "use --processes" in done.stderr


@pytest.mark.slow
def test_a_sweep_is_trained_compared_and_drawn(tmp_path: Path) -> None:
    """Two tasks at once; then one more epoch would be another sweep, and the same command trains nothing."""
    path = tmp_path / "rates.yaml"
    path.write_text("method: grid\nparameters: {optim.lr: {values: [0.01, 0.00001]}}\n")
    command = ("run", str(path), "--jobs", "2", *QUICK, f"--run.root={tmp_path}", "--model.name=tiny_cnn")
    done = run_sweep(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.splitlines()[-4:]
    assert [line.split()[0] for line in table[:3]] == ["task", "0", "1"], "the better rate first"
    folder = tmp_path / "sweep_rates"
    assert {file.name for file in folder.iterdir()} == {
        *("task_000.log", "task_001.log", "results.csv", "comparison.png")
    }
    summaries = [json.loads(file.read_text()) for file in tmp_path.glob("*/summary.json")]
    assert [summary["threads"] for summary in summaries] == [max(1, owned_cores() // 2)] * 2
    again = run_sweep(*command)
    assert again.returncode == 0 and "2 tasks, 2 of them done before" in again.stdout
    assert again.stdout.splitlines()[-4:] == table
