"""Who owns a file: one at a time, dead owners are followed, living ones are not, whatever lies in the file's place."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lockstep import lease as module
from lockstep.errors import UserError
from lockstep.lease import Lease, held

HOLD = """
import sys, time
from pathlib import Path
from lockstep.lease import Lease
assert Lease(Path(sys.argv[1])).take() is None
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lease.json"


@pytest.fixture
def holder(place: Path) -> Any:
    """Another process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def pretend(place: Path, **changes: Any) -> None:
    """Let the lease at `place` say something else."""
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))


def test_one_at_a_time(place: Path) -> None:
    first, second = Lease(place), Lease(place)
    assert first.take() is None and first.problem() is None
    owner = second.take()
    assert owner is not None and owner.pid == os.getpid() and f"process {os.getpid()} on " in str(owner)
    first.release()
    assert not place.exists() and second.take() is None
    second.release()
    assert list(place.parent.iterdir()) == []


def test_a_living_process_keeps_it_and_a_killed_one_is_followed_at_once(place: Path, holder: Any) -> None:
    lease = Lease(place)
    owner = lease.take()
    assert owner is not None and owner.pid == holder.pid
    holder.kill()
    holder.wait()
    begun = time.monotonic()
    assert lease.take() is None and time.monotonic() - begun < 5
    lease.release()


def test_a_number_that_was_used_again_is_no_sign_of_life(place: Path, holder: Any) -> None:
    pretend(place, born=12.0)
    assert Lease(place).take() is None


def test_another_machine_that_gives_signs_of_life_keeps_it(
    place: Path, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 30)
    pretend(place, processes="another machine", host="node7")
    beats = subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep(1); p = {str(place)!r}; s = open(p).read()\n"
         "import json; d = json.loads(s); d['beat'] += 10; open(p + 'x', 'w').write(json.dumps(d))\n"
         "import os; os.replace(p + 'x', p)"]
    )  # fmt: skip
    owner = Lease(place).take()
    assert owner is not None and owner.host == "node7"
    beats.wait()


def test_another_machine_that_is_silent_is_followed(place: Path, holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)
    pretend(place, processes="another machine")
    begun = time.monotonic()
    assert Lease(place).take() is None and time.monotonic() - begun >= 1


def test_ancient_ones_of_other_machines_are_not_waited_for(place: Path, holder: Any) -> None:
    pretend(place, processes="another machine", beat=time.time() - 3600)
    begun = time.monotonic()
    assert Lease(place).take() is None and time.monotonic() - begun < 5


def test_signs_of_life_are_given(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    lease = Lease(place)
    assert lease.take() is None
    before = json.loads(place.read_text())["beat"]
    deadline = time.monotonic() + 10
    while json.loads(place.read_text())["beat"] == before:
        assert time.monotonic() < deadline
    lease.release()
    time.sleep(0.2)
    assert not place.exists()


def test_who_lost_it_knows_and_leaves_the_other_alone(place: Path) -> None:
    lease = Lease(place)
    assert lease.take() is None
    pretend(place, token="somebody else's", host="node7")
    assert "was taken over by process" in str(lease.problem()) and "node7" in str(lease.problem())
    lease.release()
    assert place.exists()
    lost = Lease(place.with_name("other.json"))
    assert lost.take() is None
    lost.path.unlink()
    assert lost.problem() == "was removed"
    lost.release()


@pytest.mark.parametrize("garbage", ["", "[]", "{}", '{"pid": "x"}', "\0\0", '{"pid": 1e999}'])
def test_garbage_is_nobodys(place: Path, garbage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.3)
    place.parent.mkdir()
    place.write_text(garbage)
    lease = Lease(place)
    assert lease.take() is None
    lease.release()


def test_what_is_no_file_is_named_and_never_read(place: Path) -> None:
    place.parent.mkdir()
    os.mkfifo(place)
    with pytest.raises(UserError, match="is not a file: remove it"):
        Lease(place).take()


def _write_twice(place: Path, log: Path) -> None:
    with held(place), log.open("a") as file:
        file.write(f"{os.getpid()} ")
        file.flush()
        time.sleep(0.02)
        file.write(f"{os.getpid()}\n")


def test_of_many_at_once_each_has_its_turn_also_after_a_dead_one(place: Path, holder: Any, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_write_twice, args=(place, log)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len(lines) == 8 and all(first == second for first, second in lines)
    assert not place.exists()


def test_without_hard_links(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = Lease(place)
    assert first.take() is None and Lease(place).take() is not None
    first.release()
