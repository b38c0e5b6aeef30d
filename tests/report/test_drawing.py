"""Pictures drawn by copies of the process, and what happens when one of these fails."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from lockstep.data.images import Data
from lockstep.evaluation.metrics import Predictions
from lockstep.report import drawing as module
from lockstep.report.drawing import Drawing, drawn_beside
from lockstep.report.run_figures import drawings_of
from lockstep.run.folder import Run
from lockstep.settings.config import Config


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "allowed_cores", lambda: 3)


def write_pid(path: Path, *, before: Callable[[], object] = lambda: None) -> None:
    before()
    path.write_text(str(os.getpid()))


def drawings_in(folder: Path, number: int = 5, before: Callable[[], object] = lambda: None) -> list[Drawing]:
    return [Drawing(folder / str(index), partial(write_pid, before=before)) for index in range(number)]


def pids(drawings: list[Drawing]) -> list[int]:
    return [int(drawing.path.read_text()) for drawing in drawings]


def in_a_copy(act: Callable[[], object]) -> Callable[[], object]:
    own = os.getpid()
    return lambda: act() if os.getpid() != own else None


def test_a_copy_for_each_core_draws_its_share_meanwhile(tmp_path: Path) -> None:
    drawings = drawings_in(tmp_path)
    with drawn_beside(drawings):
        deadline = time.monotonic() + 30
        while not all(drawing.path.is_file() for drawing in drawings):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    first, second, third, *rest = pids(drawings)
    assert len({first, second, third, os.getpid()}) == 4 and rest == [first, second]


def test_each_is_given_when_it_is_there(tmp_path: Path) -> None:
    last = Drawing(tmp_path / "last", partial(write_pid, before=partial(wait_for, tmp_path / "seen")))
    drawings = [*drawings_in(tmp_path, 3), last]
    with drawn_beside(drawings) as finished:
        seen = [next(finished), next(finished), next(finished)]
        assert all(drawing.path.is_file() for drawing in seen) and not last.path.exists()
        (tmp_path / "seen").touch()
        assert [*seen, *finished] == drawings and last.path.is_file()
    assert os.getpid() not in pids(drawings)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("cores", "platform"), [(1, "linux"), (3, "darwin")])
def test_where_copies_are_of_no_use_all_is_drawn_here(
    cores: int, platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "allowed_cores", lambda: cores)
    monkeypatch.setattr(sys, "platform", platform)
    drawings = drawings_in(tmp_path)
    with drawn_beside(drawings):
        assert not any(drawing.path.exists() for drawing in drawings)
    assert set(pids(drawings)) == {os.getpid()}
    with drawn_beside([]):
        pass


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def unheard_of() -> None:
    class Unheard(Exception):
        """Cannot be pickled."""

    raise Unheard


@pytest.mark.parametrize("end", [killed, partial(time.sleep, 60), partial(int, "no number"), unheard_of])
def test_what_a_copy_leaves_is_drawn_here(
    end: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LONGEST_SECONDS", 0.5)
    bad = Drawing(tmp_path / "bad", partial(write_pid, before=in_a_copy(end)))
    good, before = drawings_in(tmp_path, 2), set(psutil.Process().children())
    with drawn_beside([bad, *good]):
        pass
    assert pids([bad]) == [os.getpid()] and os.getpid() not in pids(good)
    assert capfd.readouterr() == ("", "")
    assert set(psutil.Process().children()) <= before


def test_without_room_for_a_copy_all_is_drawn_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", full)
    drawings = drawings_in(tmp_path)
    with drawn_beside(drawings):
        pass
    assert set(pids(drawings)) == {os.getpid()}


def test_what_is_wrong_with_a_picture_is_raised_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    drawings = drawings_in(tmp_path, before=partial(int, "no number"))
    with pytest.raises(ValueError, match="no number"), drawn_beside(drawings):
        pass
    assert capfd.readouterr() == ("", "")


def test_one_that_cannot_be_drawn_costs_no_other(tmp_path: Path) -> None:
    bad, good = Drawing(tmp_path / "bad", lambda path: int("no number")), drawings_in(tmp_path)
    seen = []
    with pytest.raises(ValueError, match="no number"), drawn_beside([bad, *good]) as finished:
        for drawing in finished:
            seen.append(drawing)
    assert seen == good and len(pids(good)) == 5


def test_copies_die_with_the_process(tmp_path: Path) -> None:
    """As after a SIGKILL of a training: a copy that went on would keep its ports."""
    program = textwrap.dedent("""
        import os, signal, sys, time
        from pathlib import Path
        from lockstep.report import drawing
        drawing.allowed_cores = lambda: 2
        def plot(path):
            path.write_text(str(os.getpid()))
            time.sleep(60)
        drawings = [drawing.Drawing(Path(sys.argv[1]) / name, plot) for name in "ab"]
        with drawing.drawn_beside(drawings):
            while not all(shown.path.is_file() and shown.path.read_text() for shown in drawings):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    for name in "ab":
        while psutil.pid_exists(pid := int((tmp_path / name).read_text())):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_signals_to_the_whole_job_leave_no_picture_out(number: int, tmp_path: Path) -> None:
    before = in_a_copy(lambda: os.kill(os.getpid(), number))
    drawings = drawings_in(tmp_path, before=before)
    with drawn_beside(drawings):
        pass
    assert os.getpid() not in pids(drawings)


@pytest.mark.parametrize("cores", [1, 3])
def test_an_error_meanwhile_is_the_one_that_is_raised(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "allowed_cores", lambda: cores)
    drawings = drawings_in(tmp_path, before=in_a_copy(partial(time.sleep, 60)))
    bad = Drawing(tmp_path / "bad", lambda path: int("no number"))
    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt), drawn_beside([bad, *drawings]):
        raise KeyboardInterrupt
    assert not any(drawing.path.exists() for drawing in drawings)
    assert set(psutil.Process().children()) <= before


def test_a_late_answer_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the third picture would be taken for drawn when the first one is."""
    monkeypatch.setattr(module, "allowed_cores", lambda: 2)
    monkeypatch.setattr(module, "_LONGEST_SECONDS", 0.3)
    slow, never = (
        Drawing(tmp_path / name, partial(write_pid, before=in_a_copy(partial(time.sleep, seconds))))
        for name, seconds in (("slow", 0.5), ("never", 60))
    )
    other, last = drawings_in(tmp_path, 2)
    with drawn_beside([slow, other, never, last]) as finished:
        for drawing in finished:
            assert drawing.path.is_file(), drawing
            time.sleep(0.3)
    assert pids([never]) == [os.getpid()] and os.getpid() not in pids([other, last])


def test_pictures_of_copies_are_those_drawn_here(
    tmp_path: Path, evaluated: tuple[Data, Predictions], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, predictions = evaluated
    here = drawings_of(Run(tmp_path / "here", Config(), {}), predictions, data)
    beside = drawings_of(Run(tmp_path / "beside", Config(), {}), predictions, data)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # a team of OpenMP, which copies do not have
    try:
        torch.ones(512, 512) @ torch.ones(512, 512)
        with drawn_beside(beside):
            torch.ones(512, 512) @ torch.ones(512, 512)
            monkeypatch.setattr(Drawing, "draw", lambda drawing: pytest.fail(f"{drawing.path} is drawn here"))
    finally:
        torch.set_num_threads(threads)
    assert len(here) == len(beside) == 5
    monkeypatch.undo()
    for ours, theirs in zip(here, beside, strict=True):
        assert ours.draw().read_bytes() == theirs.path.read_bytes(), ours.path.name
