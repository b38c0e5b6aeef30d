"""lockstep upload: every line of metrics.jsonl once, in order, under the run's own id, whatever the live copy has."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from folders import finished, lines, write_run
from logs import wandb_points, wandb_records, wandb_summary
from PIL import Image
from programs import QUICK, finish, launch, launch_command, read_lines, start, wait_for_step

from lockstep.__main__ import main
from lockstep.commands import upload
from lockstep.errors import UserError
from lockstep.lease import Lease
from lockstep.run.history import read_history, scalars_of


def rebuilt(run: Path) -> list[dict[str, Any]]:
    """The records of the one offline run that an upload has left."""
    (place,) = (run / "wandb" / "rebuilt" / "wandb").glob("offline-run-*")
    return wandb_records(place)


def expected_points(run: Path) -> list[dict[str, Any]]:
    return [{**axes, **values} for axes, values in map(scalars_of, read_history(run))]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(
        tmp_path / "runs" / "digits",
        finished(0.75, best_step=20),
        [*lines([0.5, 0.75]), {"step": 20, "epoch": 2, "split": "test", "accuracy": 0.75}],
        run__group="grid",
        run__tags=("a", "b"),
        run__notes="a note",
        optim__lr=0.125,
    )
    start = [{"git_commit": "old"}, {"git_commit": "abcdef", "hostname": "node7", "processes": 2}]
    (folder / "environment.json").write_text(json.dumps(start))
    (folder / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "figures" / "curves.png")
    return folder


def test_a_run_is_rebuilt_with_every_line_once(run: Path, wandb_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "wandb").mkdir()
    (run / "wandb" / "run_id").write_text("abcd1234\n")
    assert main(["upload", "--offline", "--project=other", str(run)]) == 0
    place = next((run / "wandb" / "rebuilt" / "wandb").glob("offline-run-*-abcd1234"))
    assert capsys.readouterr().out == f"{run}: wandb sync {place}\n"
    records = rebuilt(run)
    points = wandb_points(records)
    assert points[:-1] == expected_points(run) and len(points) == 6
    assert points[-1]["curves._type"] == "image-file" and points[-1]["step"] == 20
    summary = wandb_summary(records)
    assert (summary["test_accuracy"], summary["best_step"], summary["state"]) == (0.75, 20, "finished")
    (made,) = (record["run"] for record in records if record["type"] == "run")
    about = {key: made[key] for key in ("run_id", "project", "run_group", "job_type", "tags", "notes", "display_name")}
    assert list(about.values()) == ["abcd1234", "other", "grid", "train", ["a", "b"], "a note", "digits"]
    assert made["git"]["commit"] == "abcdef"
    config = made["config"]["update"]
    assert config["optim"]["lr"] == 0.125 and config["environment"]["hostname"] == "node7"
    assert records[-1]["exit"].get("exit_code", 0) == 0


def test_again_and_of_a_broken_run(run: Path, wandb_home: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"state": "running"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "split": "train", "loss": "NaN"}\n{"step": 40, "sp')
    ids = []
    for flags in ([], [], ["--as_new"], []):
        assert main(["upload", "--offline", *flags, str(run.parent)]) == 0
        ids.append((run / "wandb" / "run_id").read_text())
        (place,) = (run / "wandb" / "rebuilt" / "wandb").glob("offline-run-*")  # one, never two
        assert place.name.endswith(ids[-1])
    assert ids[0] == ids[1] != ids[2] == ids[3]
    points = wandb_points(records := rebuilt(run))
    assert [point["step"] for point in points] == [10, 10, 20, 20, 20, 30, 30]  # the last is the figure
    assert math.isnan(float(points[5]["train/loss"]))
    assert records[-1]["exit"]["exit_code"] == 1


def test_what_cannot_be_uploaded_is_a_line_and_stops_no_other(
    run: Path, tmp_path: Path, wandb_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write_run(tmp_path / "runs" / "empty", None, [])
    (tmp_path / "bare").mkdir()
    live = write_run(tmp_path / "live", None, lines([0.5]))
    lease = Lease(live / "lease.json")
    assert lease.take() is None
    assert main(["upload", "--offline", *map(str, (tmp_path / "bare", live, tmp_path / "runs"))]) == 1
    lease.release()
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == f"error: there is no run in {tmp_path / 'bare'}"
    assert errors[1].startswith(f"error: {live} is being trained by process {os.getpid()}")
    assert errors[2] == f"error: {empty} has nothing to upload: no line of metrics.jsonl"
    assert len(errors) == 3 and rebuilt(run) and not (live / "wandb").exists()


def test_online_without_a_key_is_one_line(run: Path, wandb_home: Path) -> None:
    with pytest.raises(UserError, match="no API key: run `wandb login` once, or give --offline"):
        upload.main([str(run)])
    assert not (run / "wandb").exists()


def test_a_server_that_takes_nothing_is_one_line(
    run: Path, wandb_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lockstep.run.rebuild.INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    (run / "wandb").mkdir()
    (run / "wandb" / "run_id").write_text("abcd1234")
    assert upload.main(["--as_new", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: W&B did not take {run} (") and line.endswith("--as_new writes another")
    assert (run / "wandb" / "run_id").read_text() == "abcd1234"


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_of_three_starts_is_whole_again(processes: int, tmp_path: Path, wandb_home: Path) -> None:
    settings = [*QUICK, "--train.epochs=8", "--log.every_steps=1", "--log.wandb=offline", "--run.name=killed"]
    settings = [setting for setting in settings if setting not in ("--train.epochs=2", "--log.wandb=disabled")]
    run = tmp_path / "runs" / "killed"
    for step in (7, 17):
        killed = start([*launch_command(processes, "train.py"), *settings], tmp_path)
        wait_for_step(run, step, killed)
        os.killpg(killed.pid, signal.SIGKILL)
        finish(killed, 30)
    done = launch(*settings, cwd=tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    parts = list((run / "wandb").glob("offline-run-*"))
    identity = (run / "wandb" / "run_id").read_text()
    assert len(parts) == 3 and all(part.name.endswith(identity) for part in parts)
    assert main(["upload", "--offline", str(run)]) == 0
    records = rebuilt(run)
    assert wandb_points(records) == expected_points(run)
    steps = [line["step"] for line in read_lines(run) if line["split"] == "train"]
    assert steps == list(range(1, 41))
    assert wandb_summary(records)["restarts"] == 2
    assert next(record["run"]["run_id"] for record in records if record["type"] == "run") == identity
