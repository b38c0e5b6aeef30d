"""Work shared among copies of a process: in order, with their errors, and gone when the process is."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from lockstep.data.decoding import UnreadableImage
from lockstep.errors import UserError
from lockstep.launch import copies
from lockstep.launch.copies import map_over_cores

Left = Callable[[], list[psutil.Process]]


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "allowed_cores", lambda: 3)


@pytest.fixture
def left() -> Iterator[Left]:
    """What children this process has that it did not have before the test."""
    before = psutil.Process().children()
    yield lambda: [child for child in psutil.Process().children() if child not in before]


def test_results_come_in_order_from_copies(tmp_path: Path) -> None:
    own, places = os.getpid(), [threading.Lock()]  # which cannot be pickled

    def work(number: int) -> tuple[int, int]:
        assert places
        time.sleep(0.02 * (number % 3))
        return number**2, os.getpid()

    numbers, pids = zip(*map_over_cores(work, range(20)), strict=True)
    assert numbers == tuple(number**2 for number in range(20))
    assert len(set(pids)) == 3 and own not in pids


@pytest.mark.parametrize(
    ("cores", "tasks", "platform"), [(1, 5, "linux"), (3, 1, "linux"), (3, 0, "linux"), (3, 5, "darwin")]
)
def test_where_copies_are_of_no_use_the_process_works(
    cores: int, tasks: int, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "allowed_cores", lambda: cores)
    monkeypatch.setattr(copies.sys, "platform", platform)
    results = list(map_over_cores(lambda number: (number, os.getpid(), threading.get_ident()), range(tasks)))
    assert [number for number, _, _ in results] == list(range(tasks))
    assert all(pid == os.getpid() for _, pid, _ in results)
    assert all((thread == threading.get_ident()) == (platform == "linux") for _, _, thread in results)


@pytest.mark.parametrize("room", [0, 2])
def test_without_room_for_a_copy_threads_do_the_work(room: int, left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that had begun do not go on beside them, nor does the program wait for these at its end."""
    fork, forked = os.fork, []

    def fill() -> int:
        if len(forked) == room:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        forked.append(True)
        return fork()

    monkeypatch.setattr(os, "fork", fill)
    assert list(map_over_cores(lambda task: (task, os.getpid()), range(5))) == [(i, os.getpid()) for i in range(5)]
    assert len(forked) == room and not left()


@pytest.mark.parametrize("error", [UnreadableImage("a.jpg cannot be decoded"), OSError(28, "No space left on device")])
def test_errors_of_a_copy_are_raised_as_they_are(error: Exception, left: Left) -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 2:
            raise error
        time.sleep(0.01)
        return number

    with pytest.raises(type(error)) as caught:
        done.extend(map_over_cores(work, range(1000)))
    assert str(caught.value) == str(error) and done == [0, 1]
    assert "in work" in "".join(traceback.format_exception(caught.value)), "where it was raised"
    assert not left()


def test_an_error_that_cannot_be_pickled_is_told(left: Left, capfd: pytest.CaptureFixture[str]) -> None:
    class Unheard(Exception):
        """Of a class that no other process finds."""

    class TwoWords(Exception):
        """Which cannot be read again."""

        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} {two}")

    def work(number: int) -> None:
        raise Unheard("of this") if number == 0 else TwoWords("of", "that")

    with pytest.raises(RuntimeError, match=r"(?s)in work.*Unheard: of this"):
        list(map_over_cores(work, range(2)))
    with pytest.raises(RuntimeError, match=r"(?s)in work.*TwoWords: of that"):
        list(map_over_cores(work, range(1, 3)))
    assert not left() and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tasks", [20, 20_000])
def test_a_killed_copy_is_one_line(tasks: int, left: Left, capfd: pytest.CaptureFixture[str]) -> None:
    own, begun = os.getpid(), time.monotonic()

    def work(number: int) -> None:
        if number == 7 and os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60 if number == 8 else 0)

    with pytest.raises(UserError, match="was killed: the same command begins anew; if memory is short") as caught:
        list(map_over_cores(work, range(tasks)))
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")
    assert time.monotonic() - begun < 30, "another copy was waited for"
    assert not left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_to_the_whole_job_are_the_program_s(number: int) -> None:
    assert list(map_over_cores(lambda task: os.kill(os.getpid(), number) or task, range(9))) == list(range(9))


def test_copies_work_although_torch_has_threads() -> None:
    """GNU's OpenMP waits for ever for the threads that a copy does not have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ones = torch.ones(2**20)
        (ones + ones).sum()  # a team
        sums = list(map_over_cores(lambda task: (ones + task).sum().item(), range(6)))
    finally:
        torch.set_num_threads(threads)
    assert sums == [2**20 * (1 + task) for task in range(6)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("early", [True, False])
def test_copies_die_with_the_program(early: bool, tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, sys, time
        from lockstep.launch import copies
        copies.allowed_cores = lambda: 2
        begin = copies.leave_signals_to

        def begin_late(program):
            os.write(1, b"%d\\n" % os.getpid())  # as a whole
            time.sleep(1 if sys.argv[1] == "True" else 0)
            begin(program)

        copies.leave_signals_to = begin_late
        list(copies.map_over_cores(lambda task: os.write(1, b"works\\n") and time.sleep(1000), range(2)))
    """)
    process = subprocess.Popen([sys.executable, "-c", program, str(early)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(2 if early else 4)]
    found = [psutil.Process(int(line)) for line in lines if line != "works"]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(found) == 2 and not psutil.wait_procs(found, timeout=20)[1], "an orphan"


def hold(work: Callable[[int], object]) -> None:
    next(map_over_cores(work, range(100)))


def test_results_that_nobody_wants_leave_no_process(left: Left) -> None:
    begun = time.monotonic()
    hold(lambda task: time.sleep(60 if task else 0))
    assert not left() and time.monotonic() - begun < 30


def test_copies_end_when_nobody_can_have_their_results(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a signal ends the program just while it makes them."""
    monkeypatch.setattr(copies, "_end", lambda _, results: [own.close() for own in results])
    hold(lambda task: bytes(2**16))  # more than a pipe holds
    assert not psutil.wait_procs(left(), timeout=20)[1]
