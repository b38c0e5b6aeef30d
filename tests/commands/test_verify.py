"""lockstep verify: a stretch of a run recomputed, by one process or several, and found equal or not."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from fork_server import ForkServer
from programs import QUICK, finish, launch_command, start

from lockstep.commands.verify import plan_of
from lockstep.errors import UserError
from lockstep.files import write_json
from lockstep.run.history import read_history, read_starts
from lockstep.settings.cli import parse_config

SETTINGS = (*QUICK, "--runtime.threads=1", "--log.every_steps=1", "--checkpoint.every_steps=2", "--run.name=mine")
VERIFY = """
import sys
from lockstep.__main__ import main
sys.exit(main(["verify", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def run(server: ForkServer, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    place = tmp_path_factory.mktemp("verify")
    more = ("--checkpoint.keep_last=9", "--train.ema_decay=0.9", "--schedule.name=plateau", "--augment.mixup=0.2")
    server.run(1, place, *SETTINGS, *more, f"--data.cache_dir={cache_dir}")
    (place / "verify.py").write_text(VERIFY)
    return place / "runs" / "mine"


def verify(server: ForkServer, run: Path, *arguments: str, processes: int = 1, code: int = 0) -> str:
    place = run.parents[1]
    return server.run(processes, place, str(run), *arguments, program=place / "verify.py", code=code)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("arguments", "processes", "stretch"),
    [((), 1, "9 to 10"), (("--step", "3"), 3, "3 to 3"), (("--step=1",), 2, "1 to 1")],
)
def test_a_stretch_is_recomputed_on_any_number_of_processes(
    arguments: tuple[str, ...], processes: int, stretch: str, run: Path, server: ForkServer
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    printed = verify(server, run, *arguments, processes=processes)
    assert f"steps {stretch} of {run}, recomputed here: equal to the last bit" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert [path.name for path in run.parent.iterdir()] == ["mine"]


@pytest.mark.launch
def test_a_run_that_is_not_what_its_settings_give_is_found_out(run: Path, server: ForkServer) -> None:
    history = run / "metrics.jsonl"
    honest = history.read_text()
    (line,) = (line for line in read_history(run) if line["step"] == 10 and "digest" in line)
    history.write_text(honest.replace(line["digest"], "0" * 16))
    try:
        printed = verify(server, run, code=1)
    finally:
        history.write_text(honest)
    assert f"equal to the last bit through step 9; the train line of step 10 has digest {'0' * 16} in one" in printed
    assert "numerics are the same (" in printed and printed.strip().endswith("is removed again)")


@pytest.mark.slow
@pytest.mark.launch
def test_it_is_launched_as_a_module(run: Path) -> None:
    command = launch_command(2, "train.py")
    done = finish(start([*command[:-1], "-m", "lockstep", "verify", str(run)], run.parents[1]), 120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "recomputed here: equal to the last bit" in done.stdout


def test_what_cannot_be_recomputed_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        plan_of(tmp_path, None)
    with pytest.raises(UserError, match="no line with a digest for step 77: the nearest are 9 and 10"):
        plan_of(run, 77)
    done = finish(start([sys.executable, "-m", "lockstep", "verify", str(tmp_path)], tmp_path), 60)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no run in")


@pytest.mark.launch
def test_a_folder_that_is_not_its_own_is_left_alone(run: Path, server: ForkServer) -> None:
    plan = plan_of(run, 3)
    plan.folder.mkdir()
    (plan.folder / "precious").touch()
    assert f"{plan.folder} exists: verify would" in verify(server, run, "--step=3", code=1)
    assert (plan.folder / "precious").exists()
    shutil.rmtree(plan.folder)
    (plan.folder).mkdir()
    write_json(plan.folder / "summary.json", {"verifies": str(run)})  # of one that was killed
    assert "equal to the last bit" in verify(server, run, "--step=3")


def test_the_nearest_checkpoint_before_is_where_it_begins(run: Path) -> None:
    assert [plan_of(run, step).first for step in (1, 2, 3, 5, 6)] == [0, 0, 2, 4, 5]


def test_a_run_of_portable_kernels_can_be_recomputed(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints")))
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("portable: false", "portable: true"))
    assert parse_config(plan_of(copy, 3).arguments).runtime.portable


def test_a_stretch_is_recomputed_as_the_start_that_made_it(run: Path, tmp_path: Path) -> None:
    """Not as the last one: lines of fp32 that were judged in bf16 were called false."""
    copy = tmp_path / "x"
    shutil.copytree(run, copy, symlinks=True)
    (first,) = read_starts(run)
    numerics = {**first["numerics"], "precision": "bf16", "threads": 7}
    second = {**first, "step": 5, "precision": "bf16", "numerics": numerics}
    (copy / "environment.json").write_text(json.dumps([first, second]))
    for step, precision, threads in ((4, "no", 1), (5, "no", 1), (10, "bf16", 7)):
        arguments = plan_of(copy, step).arguments
        assert f"--runtime.precision={precision}" in arguments and f"--runtime.threads={threads}" in arguments
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="steps 1 to 10 of .* were made in two ways .*fp32 -> bf16.* after step 5"):
        plan_of(copy, 10)
    third = {**first, "step": 0}  # from the beginning again: it cut what those before it had written
    (copy / "environment.json").write_text(json.dumps([first, second, third]))
    assert "--runtime.precision=no" in plan_of(copy, 10).arguments
