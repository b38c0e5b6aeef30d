"""Who gets one line and who a traceback, and what is suggested for a misspelt name."""

import errno
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lockstep.data.sampler import Sampler
from lockstep.errors import UsageError, UserError, did_you_mean, one_line_errors
from lockstep.settings.cli import parse_config


@pytest.fixture(autouse=True)
def first_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of a machine; and the program whose end is tested here goes on, so that its alarm must not ring."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    numbers = (signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.alarm(0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_users_mistake_found_by_lockstep_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        Sampler(num_samples=3, batch_size=64, micro_batch_size=64, seed=0)
    out, err = capfd.readouterr()
    assert end.value.code == 1 and out == ""
    assert err.startswith("error: the training set has 3 samples") and err.count("\n") == 1


def test_other_errors_keep_their_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="invalid literal"), one_line_errors():
        int("three")
    with pytest.raises(ZeroDivisionError), one_line_errors():
        Sampler(num_samples=3, batch_size=1, micro_batch_size=0, seed=0)
    with pytest.raises(yaml.YAMLError), one_line_errors():
        yaml.safe_load("[")
    assert capfd.readouterr().err == ""


def test_without_an_error_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with one_line_errors():
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("local_rank", "waits"), [("0", False), ("3", True), ("x", False), ("-1", False)])
def test_other_processes_let_the_first_speak(
    local_rank: str, waits: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    naps: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("lockstep.errors.time.sleep", naps.append)
    with pytest.raises(SystemExit) as end, one_line_errors():
        Sampler(num_samples=3, batch_size=64, micro_batch_size=64, seed=0)
    assert end.value.code == 1 and bool(naps) == waits and capfd.readouterr().err.count("\n") == 1


def test_a_slip_of_ours_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    """Also a ValueError from a line of this package."""
    slip = "def slip():\n    list(zip([1], [1, 2], strict=True))\n"
    scope: dict[str, object] = {}
    exec(compile(slip, str(Path(parse_config.__code__.co_filename).with_name("slip.py")), "exec"), scope)
    with pytest.raises(ValueError, match="zip"), one_line_errors():
        scope["slip"]()  # type: ignore[operator]
    assert capfd.readouterr().err == ""


def test_a_users_mistake_is_one_line_wherever_it_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    """Also in a program that stands on top of the package."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise UserError("--split=val: this run has no such split")
    assert end.value.code == 1 and capfd.readouterr().err == "error: --split=val: this run has no such split\n"


def test_a_mistake_in_a_command_line_has_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        parse_config(["--optim.lrr=1"])
    assert end.value.code == 2 and capfd.readouterr().err.startswith("error: unknown setting --optim.lrr.")


def test_only_the_first_process_of_a_machine_speaks_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise UsageError("unknown setting --optim.lrr")
    assert end.value.code == 2 and capfd.readouterr() == ("", "")


def test_trouble_of_the_disk_is_one_line_and_other_errors_of_files_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
    assert end.value.code == 1 and capfd.readouterr().err == "error: No space left on device (/data/x)\n"
    with pytest.raises(FileNotFoundError), one_line_errors():
        open("/nowhere/at/all")


def test_suggestions_are_few_near_and_silent_when_nothing_is_near() -> None:
    names = {"optim.lr", "optim.momentum", "train.epochs", "schedule.warmup_epochs"}
    assert did_you_mean("optim.momentun", names) == " Did you mean optim.momentum?"
    assert "train.epochs" in did_you_mean("epochs", names)
    assert did_you_mean("optim.l", {f"optim.l{i}" for i in range(9)}).count("optim.") == 2
    assert did_you_mean("xyz", names) == ""
    assert did_you_mean("fashionmnist", {"FashionMNIST", "MNIST"}).startswith(" Did you mean FashionMNIST")
