"""Who is named when processes wait; whole programs that stand still are in test_stalls.py."""

import json
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from lockstep.launch import watch
from lockstep.launch.stack import START
from lockstep.launch.watch import Beat, Stall, Watch, judge

LONG, SHORT = watch.NAMED_SECONDS + 1, 0.5


def beat(rank: int, phase: str, *, waits: bool = False, seconds: float = LONG, step: int = 7) -> Beat:
    return Beat(rank, f"node{rank}", step, phase, waits, seconds, "loader.py:9 _stream")


def waiting(rank: int, **more: Any) -> Beat:
    return beat(rank, "gradient exchange", waits=True, **more)


def culprits(stall: Stall | None) -> list[int]:
    return [] if stall is None else [rank for rank, *_ in stall.culprits]


@pytest.mark.parametrize(
    ("beats", "named"),
    [
        ([waiting(0), beat(1, "data"), waiting(2)], [1]),
        ([waiting(0), beat(1, "data", seconds=SHORT), waiting(2)], [1]),  # slow, and not stuck
        ([waiting(0), beat(1, "data"), beat(2, "save")], [1, 2]),
        ([waiting(0, seconds=SHORT), beat(1, "data"), waiting(2, seconds=SHORT)], []),
        ([beat(0, "backward"), beat(1, "data")], [1]),  # the wait may be torch's own
        ([waiting(0), beat(1, "backward")], [1]),
        ([beat(0, "backward"), beat(1, "backward")], []),  # slow alike
        ([beat(0, "evaluation"), beat(1, "evaluation")], []),
        ([waiting(0, step=9), beat(1, "data", step=8), beat(2, "data", step=9)], [1]),  # devices run behind their hosts
        ([waiting(0, step=9), waiting(1, step=8)], [1]),
        ([waiting(0), waiting(1)], [0, 1]),
        ([waiting(0), waiting(1, seconds=SHORT)], []),
        ([waiting(0), beat(1, START)], []),  # it may be preparing data
    ],
)
def test_those_that_others_wait_for_are_named(beats: list[Beat], named: list[int]) -> None:
    stall = judge(beats, {})
    assert culprits(stall) == named
    if stall is not None:
        assert all(f"rank {rank} (node{rank})" in stall.line for rank in named) and "\n" not in stall.line
        assert not stall.may_last


def test_who_prepares_data_is_named_after_a_minute_and_may_go_on() -> None:
    stall = judge([waiting(0, seconds=61), beat(1, START)], {})
    assert culprits(stall) == [1] and stall is not None and stall.may_last


def test_silence_counts_before_all_else() -> None:
    stall = judge([waiting(0), beat(1, "data"), waiting(2)], {2: 9.0})
    assert culprits(stall) == [2]
    assert stall is not None and "no sign of life for 9 s from rank 2 (node2)" in stall.line


def test_many_ranks_make_a_short_line() -> None:
    stall = judge([waiting(0, step=9), *(beat(rank, "data") for rank in range(1, 500))], {})
    assert stall is not None and len(stall.line) < 400 and "rank 4 (node4) and 495 more" in stall.line


def test_a_stall_is_named_once_and_ends_the_run_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 1000.0, []
    monkeypatch.setattr("time.monotonic", lambda: now)
    patience = watch._Patience(600, said.append)
    stall = Stall(((1, 7, "data"),), "rank 1")
    for _ in range(590):
        assert patience.consider(stall) is None
        now += 1
    assert len(said) == 10, "a line a minute"
    assert patience.consider(replace(stall, culprits=((1, 8, "data"),))) is None, "it has moved: slow, not stuck"
    for _ in range(592):
        assert patience.consider(stall) is None
        now += 1
    ended = patience.consider(stall)
    assert ended is not None and ended.startswith("rank 1") and "--runtime.stuck_seconds=600" in ended
    assert patience.consider(replace(stall, may_last=True)) is None


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> list[Watch]:
    """Two watches of this process as if of two, that have met."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    meeting = [threading.Barrier(2) for _ in range(3)]
    boards: list[dict[int, Any]] = [{}, {}, {}]
    watches: dict[int, Watch] = {}

    def make(rank: int) -> None:
        turn = iter(range(3))

        def gather(own: Any) -> list[Any]:
            number = next(turn)
            boards[number][rank] = own
            meeting[number].wait(10)
            return [boards[number][other] for other in (0, 1)]

        watches[rank] = Watch(rank, gather, 600)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [watches[0], watches[1]]


def test_beats_reach_the_first_process_and_its_word_reaches_all(pair: list[Watch]) -> None:
    first, other = pair
    assert first.is_on and other.is_on
    other._send(other._first, {"beat": vars(Beat(1, "node1", step=12))})
    assert first._receive(1) == {1} and first._heard[1][1].step == 12
    before = other._verdict_heard
    first._tell({"end": None})
    assert other._receive(1) == {0} and other._verdict_heard > before
    other.leave()
    first._receive(1)
    assert not first._heard, "nobody waits for the beats of a process that is done"
    first.leave()
    other._receive(1)
    assert other._ended.is_set()


def test_a_beat_that_comes_after_the_word_that_it_leaves_counts_no_more(pair: list[Watch]) -> None:
    first, other = pair
    other.leave()
    other._send(other._first, {"beat": vars(Beat(1, "node1"))})
    first._receive(1)
    assert not first._heard


def test_a_watch_that_fails_is_no_silence(pair: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = pair
    monkeypatch.setattr(other, "_beat", lambda: 1 / 0)
    other._live()
    first._receive(1)
    assert not first._heard, "nobody waits for its beats"


def test_datagrams_of_strangers_are_ignored(pair: list[Watch]) -> None:
    first, other = pair
    stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    target = other._socket.getsockname()[1]
    for content in (
        b"",
        b"\xff",
        b"[" * 60_000,
        json.dumps({"end": "all end"}).encode(),
        b"x" * 16 + b'{"end": "end"}',
    ):
        stranger.sendto(content, ("127.0.0.1", target))
    assert other._receive(0.5) == set()
    stranger.close()


def test_a_machine_without_datagrams_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    monkeypatch.setattr(watch, "_MEETING_SECONDS", 0.2)
    begun = time.monotonic()
    alone = Watch(1, lambda own: [own, own], 600)
    assert not alone.is_on and time.monotonic() - begun < 30
