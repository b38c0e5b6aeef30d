"""Launches that are not what they seem, produced for real, and ranks that fail: one message, no hang, no training."""

import json
import re
import time
from pathlib import Path

import pytest
from fork_server import ForkServer
from programs import LAUNCHER, QUICK, ROOT, finish, free_port, launch, start

pytestmark = pytest.mark.launch


def run_launcher(*options: str, cwd: Path, settings: tuple[str, ...] = QUICK, **extra: str) -> tuple[int, str]:
    """`accelerate launch` with any options; returns its code and what was printed."""
    done = finish(start([*LAUNCHER, *options, str(ROOT / "train.py"), *settings], cwd, **extra), 120)
    return done.returncode, done.stdout + done.stderr


def errors(printed: str) -> list[str]:
    return re.findall(r"^error: .*$", printed, flags=re.MULTILINE)


def last_words(printed: str) -> str:
    """The last line of torchrun's report, above the rule that closes it."""
    return printed.rstrip().splitlines()[-2]


def test_launcher_that_starts_one_process_instead_of_two_is_refused(tmp_path: Path) -> None:
    code, printed = run_launcher("--cpu", "--num_processes", "2", cwd=tmp_path)
    assert code != 0 and not (tmp_path / "runs").exists()
    (error,) = errors(printed)
    assert "started one" in error and "accelerate_configs/cpu_2proc.yaml" in error


def test_two_processes_that_train_alone_are_refused(tmp_path: Path) -> None:
    """As SLURM templates do it: each process is told how many there should be, and sees itself alone."""
    code, printed = run_launcher("--cpu", "--num_processes", "1", cwd=tmp_path, EXPECTED_WORLD_SIZE="2")
    assert code != 0 and not (tmp_path / "runs").exists()
    (error,) = errors(printed)
    assert "EXPECTED_WORLD_SIZE says 2" in error and "alone" in error


@pytest.mark.slow
def test_multi_gpu_launch_without_gpus_trains_together_on_the_cpu(tmp_path: Path) -> None:
    """Accelerate alone makes two trainings of one process each out of this launch."""
    options = ("--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()))
    code, printed = run_launcher(*options, cwd=tmp_path, settings=(*QUICK, "--train.max_steps=1"))
    assert code == 0, printed
    assert "2 processes" in printed and printed.count("test accuracy") == 1


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    code, printed = run_launcher("--num_processes", "1", "--mixed_precision", "fp16", cwd=tmp_path)
    assert code != 0
    (error,) = errors(printed)
    assert "fp16" in error and "CPU" in error and "bf16" in error


@pytest.mark.slow
def test_one_thread_from_the_launcher_is_overruled(tmp_path: Path, all_cores: set[int]) -> None:
    code, printed = run_launcher(cwd=tmp_path, settings=(*QUICK, "--train.max_steps=1"), OMP_NUM_THREADS="1")
    assert code == 0, printed
    assert f"{len(all_cores)} CPU threads" in printed


@pytest.mark.slow
def test_numbers_that_do_not_fit_the_launch_end_all_ranks_with_one_message(tmp_path: Path) -> None:
    done = launch(*QUICK, "--train.batch_size=64", cwd=tmp_path, processes=3, timeout_seconds=60)
    assert done.returncode != 0
    (error,) = errors(done.stdout + done.stderr)
    assert "batch_size=64" in error and "too few for 3 processes: launch at most 1" in error
    assert not (tmp_path / "runs").exists()
    assert last_words(done.stderr).endswith(error)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_with_its_message(tmp_path: Path) -> None:
    """Rank 1 alone cannot open its data: the others, which wait for it, must end within seconds."""
    program = tmp_path / "one_fails.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "from lockstep.errors import UserError, one_line_errors\n"
        "from lockstep.settings.cli import parse_config\n"
        "def build_data(*_, **__):\n"
        "    raise UserError('there is no folder only_rank_1_looks_here')\n"
        "if os.environ['RANK'] == '1':\n"
        "    train.build_data = build_data\n"
        "with one_line_errors():\n"
        "    train.train(parse_config([*sys.argv[1:], '--run.name=x']))\n"
    )
    config = str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")
    command = [*LAUNCHER, "--config_file", config, "--main_process_port", str(free_port()), str(program)]
    begun = time.monotonic()
    done = finish(start([*command, *QUICK], tmp_path), 90)
    assert done.returncode != 0 and time.monotonic() - begun < 60
    (error,) = errors(done.stdout + done.stderr)
    assert "only_rank_1_looks_here" in error
    assert last_words(done.stderr).endswith(error)


def test_evaluation_of_1_2_and_3_processes_is_identical(server: ForkServer, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    server.run(1, tmp_path, *QUICK, "--run.name=run", f"--data.cache_dir={tmp_path / 'cache'}")
    printed, tables, metrics = [], [], []
    for processes in (1, 2, 3):
        arguments = ("--run", "runs/run", "--split", "train", "--runtime.threads=1")
        said = server.run(processes, tmp_path, *arguments, program=ROOT / "eval.py")
        assert f"{processes} process" in said
        printed.append([line for line in said.splitlines() if line.startswith(("accuracy ", *"0123456789"))])
        metrics.append(json.loads((tmp_path / "runs/run/metrics_train.json").read_text()))
        assert f"{processes} process" in metrics[-1].pop("how")
        tables.append(pq.read_table(tmp_path / "runs/run/predictions_train.parquet"))
    assert len(printed[0]) == 11 and printed[0] == printed[1] == printed[2]
    assert metrics[0] == metrics[1] == metrics[2] and metrics[0]["metrics"]["roc_auc"] > 0.5
    assert tables[0].num_rows == 1294 and tables[0].equals(tables[1]) and tables[0].equals(tables[2])
