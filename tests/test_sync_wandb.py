"""slurm/sync_wandb.sh against a `wandb` that writes down what it is asked to upload, or fails, or hangs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from programs import ROOT
from slurm_cluster import eventually

SCRIPT = str(ROOT / "slurm" / "sync_wandb.sh")


class Place:
    """A runs folder, and a stand-in for the wandb command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir()
        self.set_wandb("exit 0")

    def set_wandb(self, end: str) -> None:
        command = self.folder / "bin" / "wandb"
        command.write_text(f'#!/bin/bash\necho "$*" >> {self.log}\n{end}\n')
        command.chmod(0o755)

    def add(self, run: str, part: str) -> Path:
        path = self.folder / "runs" / run / "wandb" / f"offline-run-{part}" / f"run-{part}.wandb"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        return path

    def add_evaluation(self, run: str, part: str) -> Path:
        return self.add(f"{run}/wandb/eval", part)

    def command(self, *arguments: str) -> list[str]:
        return ["bash", SCRIPT, *arguments, str(self.folder / "runs")]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def sync(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment(), capture_output=True, text=True, timeout=30
        )

    def asked(self) -> list[str]:
        """The uploads so far, forgotten with this."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_uploads_what_is_new_each_run_with_all_its_parts(place: Place) -> None:
    place.add("a", "20260101_000000-aa")
    live = place.add("b", "20260101_000000-bb")
    resumed = place.add("b", "20260102_000000-bb")
    (place.folder / "runs" / "without-wandb").mkdir()
    assert place.sync().returncode == 0
    parts = " ".join(str(path.parent) for path in (live, resumed))
    asked = place.asked()
    assert len(asked) == 2 and asked[1] == f"sync --include-synced --yes {parts}"
    assert place.sync().returncode == 0 and place.asked() == [], "nothing is new"
    time.sleep(0.05)
    resumed.write_bytes(b"xy")
    assert place.sync().returncode == 0 and len(place.asked()) == 1


def test_evaluations_are_uploaded_too(place: Place) -> None:
    place.add("a", "20260101_000000-aa")
    evaluation = place.add_evaluation("a", "20260103_000000-aa-step_00000400-test")
    assert place.sync().returncode == 0
    assert place.asked()[1] == f"sync --include-synced --yes {evaluation.parent}"
    assert place.sync().returncode == 0 and place.asked() == []


def test_what_failed_is_said_and_tried_again_and_the_others_go_on(place: Place) -> None:
    place.add("a", "1-aa")
    place.add("b", "1-bb")
    place.set_wandb("[[ $* != *1-aa* ]]")
    done = place.sync()
    assert done.returncode == 1 and "runs/a was not uploaded" in done.stderr and "runs/b" not in done.stderr
    place.asked()
    place.set_wandb("exit 0")
    assert place.sync().returncode == 0
    (again,) = place.asked()
    assert "1-aa" in again


@pytest.mark.parametrize("end", ["sleep 300", "exit 0"], ids=["in an upload", "between two looks"])
def test_can_be_stopped_at_any_time_and_counts_nothing_as_done_that_is_not(end: str, place: Place) -> None:
    place.add("a", "1-aa")
    place.set_wandb(end)
    process = subprocess.Popen(place.command("--interval", "60"), env=place.environment())
    try:
        eventually(place.log.exists, "an upload", 20)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait(10)
    stamp = place.folder / "runs/a/wandb/.uploaded"
    assert stamp.exists() == (end == "exit 0")


def test_looks_again_after_the_interval(place: Place) -> None:
    place.add("a", "1-aa")
    process = subprocess.Popen(place.command("--interval=1"), env=place.environment())
    try:
        eventually(place.log.exists, "an upload", 20)
        place.add("b", "1-bb")
        eventually(lambda: "1-bb" in place.log.read_text(), "the upload of a new run", 20)
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("arguments", [("--interval=often",), ("--intervall=1",)])
def test_mistakes_are_refused(arguments: tuple[str, ...], place: Place) -> None:
    assert place.sync(*arguments).returncode == 2
    assert place.asked() == []
