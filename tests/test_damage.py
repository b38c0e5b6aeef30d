"""What accidents do to a whole program: one clear line, at most the steps since the checkpoint before are lost."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fork_server import ForkServer
from runs import differences
from soak import STREAMED, Form, Training, last_line, run_until_finished, send

from lockstep.run.checkpoint import folder_of, saved_steps

pytestmark = pytest.mark.launch
GONE_SECONDS = 20


FORMS = {
    "alone": Form((1,)),
    "with worker": Form((1,), settings=STREAMED),
    "pair": Form((2,)),
    "pair with workers": Form((2,), settings=STREAMED),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Callable[[str], Path]:
    """Uninterrupted runs of one process, each made once."""
    runs: dict[str, Path] = {}

    def reference(form: str) -> Path:
        if form not in runs:
            runs[form] = run_until_finished(FORMS[form].alone, tmp_path_factory.mktemp("reference"), server).run
        return runs[form]

    return reference


def start_until(step: int, form: Form, place: Path, server: ForkServer) -> Training:
    """A training that has logged this step."""
    training = Training(form, place, server)
    while last_line(training.run).get("step", 0) < step:
        assert training.is_running, training.output()
        time.sleep(0.001)
    return training


def lines_of(training: Training, sign: str) -> list[str]:
    return [line for line in training.output().splitlines() if re.search(sign, line)]


# ---- files


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_bit_of_each_image_altered(path: Path) -> None:
    images = np.load(path, mmap_mode="r+")
    images[:, 3, 4] ^= 8
    images.flush()


def half_copied(folder: Path) -> None:
    """As a copy that was broken off: some files, no manifest."""
    for name in ("manifest.json", "optimizer.pt", "progress.json"):
        (folder / name).unlink()


# What is done to the run folder and its newest checkpoint, and the line that a restart says about it.
TO_THE_NEWEST: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda newest: cut_short(newest / "model.safetensors"), "model.safetensors has .* bytes instead of"),
    "altered": (lambda newest: altered(newest / "optimizer.pt"), "optimizer.pt was altered"),
    "missing": (lambda newest: (newest / "ema.safetensors").unlink(), "ema.safetensors is missing"),
    "half copied": (half_copied, "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", TO_THE_NEWEST)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    damage: str, tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    begun = start_until(9, FORMS["alone"], tmp_path, server)
    begun.kill()
    before, newest = saved_steps(begun.run / "checkpoints")[-2:]
    spoil, message = TO_THE_NEWEST[damage]
    spoil(folder_of(begun.run / "checkpoints", newest))
    resumed = Training(FORMS["alone"], tmp_path, server)
    assert resumed.finish() == 0, resumed.output()
    (line,) = lines_of(resumed, "is damaged")
    assert re.search(f"step_{newest:08d} is damaged .*{message}.*: using the one before it", line)
    assert lines_of(resumed, "continuing") == [f"continuing runs/tiny after step {before}"]
    assert differences(resumed.run, references("alone")) == []


def half_written_folder(run: Path) -> None:
    aside = run / "checkpoints" / ".tmp_step_00000099"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"half")
    (run / "checkpoints" / ".tmp_last").symlink_to(aside)
    (run / ".config.yaml.tmp").write_text("ru")


def links_removed(run: Path) -> None:
    for name in ("last", "best"):
        (run / "checkpoints" / name).unlink(missing_ok=True)


TO_THE_RUN: dict[str, Callable[[Path], object]] = {
    "half-written folder": half_written_folder,
    "links removed": links_removed,
    "cache deleted": lambda run: shutil.rmtree(run.parents[1] / "cache"),
    "cache truncated": lambda run: [cut_short(path) for path in (run.parents[1] / "cache").glob("*.npy")],
    "cache altered": lambda run: [
        a_bit_of_each_image_altered(path) for path in (run.parents[1] / "cache").glob("*.npy")
    ],
    "history cut": lambda run: cut_short(run / "metrics.jsonl"),
    "summary empty": lambda run: (run / "summary.json").write_text(""),
}


@pytest.mark.parametrize("damage", TO_THE_RUN)
def test_other_damage_costs_the_steps_since_the_newest_checkpoint(
    damage: str, tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    begun = start_until(9, FORMS["alone"], tmp_path, server)
    begun.kill()
    newest = saved_steps(begun.run / "checkpoints")[-1]
    TO_THE_RUN[damage](begun.run)
    resumed = Training(FORMS["alone"], tmp_path, server)
    assert resumed.finish() == 0, resumed.output()
    assert lines_of(resumed, "continuing") == [f"continuing runs/tiny after step {newest}"]
    assert len(lines_of(resumed, "image cache .* is damaged")) == (
        2 if damage in ("cache truncated", "cache altered") else 0
    )
    assert differences(resumed.run, references("alone")) == []


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_anew(
    tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    begun = start_until(3, FORMS["alone"], tmp_path, server)
    assert lines_of(begun, "begun before") == []
    begun.kill()
    shutil.rmtree(begun.run / "checkpoints")
    again = Training(FORMS["alone"], tmp_path, server)
    assert again.finish() == 0, again.output()
    assert lines_of(again, "begun before") == ["runs/tiny was begun before and has no checkpoint: from the beginning"]
    assert differences(again.run, references("alone")) == []


# ---- disks


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_in_trouble_is_one_line_and_the_same_command_continues(
    trouble: str, small_disk: Path, tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    begun = start_until(9, FORMS["alone"], tmp_path, server)
    begun.kill()
    newest = saved_steps(begun.run / "checkpoints")[-1]
    if trouble == "full":
        (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    stopped = Training(FORMS["alone"], tmp_path, server)
    assert stopped.finish() == 1
    (line,) = lines_of(stopped, "^error: ")
    assert ("No space left" if trouble == "full" else "Read-only file system") in line and "runs/tiny" in line
    assert "Traceback" not in stopped.output()
    if trouble == "full":
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    resumed = Training(FORMS["alone"], tmp_path, server)
    assert resumed.finish() == 0, resumed.output()
    assert lines_of(resumed, "continuing") == [f"continuing runs/tiny after step {newest}"]
    assert differences(resumed.run, references("alone")) == []


def test_a_disk_that_fills_during_training_ends_it_with_one_line(
    small_disk: Path, tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    begun = start_until(7, FORMS["alone"], tmp_path, server)
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)) == 4096:
            pass
    assert begun.finish() == 1
    assert len(lines_of(begun, "^error: ")) == 1 and "Traceback" not in begun.output()
    newest = saved_steps(begun.run / "checkpoints")[-1]
    (small_disk / "filler").unlink()
    resumed = Training(FORMS["alone"], tmp_path, server)
    assert resumed.finish() == 0, resumed.output()
    assert lines_of(resumed, "continuing") == [f"continuing runs/tiny after step {newest}"]
    assert differences(resumed.run, references("alone")) == []


def test_a_cache_that_is_cut_while_it_is_in_use_says_where_and_is_made_again(
    tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    begun = start_until(3, FORMS["alone"], tmp_path, server)
    for file in (tmp_path / "cache").glob("*.npy"):
        os.truncate(file, 0)
    while begun.is_running:
        time.sleep(0.01)
    assert "Fatal Python error: Bus error" in begun.output() and "loader.py" in begun.output()
    resumed = Training(FORMS["alone"], tmp_path, server)
    assert resumed.finish() == 0, resumed.output()
    assert len(lines_of(resumed, "the image cache .* is damaged .*: decoding the images again")) >= 1
    assert differences(resumed.run, references("alone")) == []


# ---- owners


@pytest.mark.slow
def test_a_second_start_is_refused_and_changes_nothing(
    tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    """Also where it has other settings, or comes from a scheduler that believes the first to be dead."""
    begun = start_until(3, FORMS["alone"], tmp_path, server)
    again = Training(FORMS["pair"], tmp_path, server)
    while again.is_running:
        time.sleep(0.01)
    assert begun.finish() == 0
    (refusal,) = set(lines_of(begun, "is being trained by process"))  # by both ranks, which no launcher ends here
    assert "touch runs/tiny/stop" in refusal and "Traceback" not in begun.output()
    assert differences(begun.run, references("alone")) == []


def test_two_starts_at_once_are_one_training(
    tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    both = [Training(FORMS["alone"], tmp_path, server) for _ in range(2)]
    while any(training.is_running for training in both):
        time.sleep(0.01)
    assert len(lines_of(both[0], "is being trained by process|was changed by another training just now")) == 1
    assert differences(both[0].run, references("alone")) == []


def test_a_removed_run_folder_ends_the_training_and_is_no_success(tmp_path: Path, server: ForkServer) -> None:
    begun = start_until(3, FORMS["pair"], tmp_path, server)
    shutil.rmtree(begun.run, ignore_errors=True)
    assert begun.finish() == 1
    assert len(lines_of(begun, "^error: .*was removed while it was trained")) >= 1, begun.output()
    assert "Traceback" not in begun.output() and not (begun.run / "summary.json").exists()


# ---- processes


@pytest.mark.slow
@pytest.mark.parametrize(("form", "message"), [("with worker", 0), ("pair with workers", 1)])
def test_a_killed_data_worker_ends_all_ranks_with_one_line(
    form: str, message: int, tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    begun = start_until(7, FORMS[form], tmp_path, server)
    workers = [child for rank in begun.ranks for child in rank.children()]
    assert workers, "a test that does not see workers proves nothing"
    send(workers[-1], signal.SIGKILL)
    struck = time.monotonic()
    assert begun.finish() == 1 and time.monotonic() - struck < GONE_SECONDS, begun.output()
    errors = lines_of(begun, "^error: ")
    # Where it was seen: in its end, while its images were waited for, or while it sent them.
    says = r"DataLoader worker .*(killed by signal: Killed|exited unexpectedly|was killed while).*--data.workers"
    assert len(errors) == 1 and re.search(says, errors[0]), begun.output()
    assert len(lines_of(begun, "^ended: another process of this run is gone")) == message
    assert "Traceback" not in begun.output()
    assert goes_on_as_if_nothing_had_been(begun, form, server, references)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_with_one_line(
    victim: int, tmp_path: Path, server: ForkServer, references: Callable[[str], Path]
) -> None:
    begun = start_until(7, FORMS["pair"], tmp_path, server)
    send(begun.ranks[victim], signal.SIGKILL)
    struck = time.monotonic()
    begun.finish()
    assert time.monotonic() - struck < GONE_SECONDS
    assert len(lines_of(begun, "^ended: another process of this run is gone")) == 1, begun.output()
    assert "Traceback" not in begun.output()
    assert goes_on_as_if_nothing_had_been(begun, "pair", server, references)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_before_the_ranks_have_connected_does_not_leave_the_others_waiting(
    victim: int, tmp_path: Path, server: ForkServer
) -> None:
    """With a launcher, the launcher would end them."""
    begun = Training(FORMS["pair"], tmp_path, server, "--runtime.rendezvous_seconds=1")
    send(begun.ranks[victim], signal.SIGKILL)
    assert begun.finish() == -signal.SIGKILL and begun.seconds < 2 * GONE_SECONDS
    (line,) = lines_of(begun, "^error: ")
    assert re.search(f"rank {victim}.* (did not|has not|is gone)", line) and "rendezvous_seconds" in line, line
    assert "Traceback" not in begun.output()


def goes_on_as_if_nothing_had_been(
    begun: Training, form: str, server: ForkServer, references: Callable[[str], Path]
) -> bool:
    newest = saved_steps(begun.run / "checkpoints")[-1]
    resumed = Training(FORMS[form], begun.place, server)
    assert resumed.finish() == 0, resumed.output()
    assert lines_of(resumed, "continuing") == [f"continuing runs/tiny after step {newest}"]
    return differences(resumed.run, references(form)) == []
