"""Work for all cores that a process owns, by copies of it: threads take turns where much of the work is Python."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from contextvars import ContextVar
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from lockstep.errors import UserError
from lockstep.launch.machine import signal_at_death_of_parent
from lockstep.launch.threads import owned_cores

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_work: ContextVar[Callable[[Any], Any]] = ContextVar("work")
"""Of a copy, or of a thread"""


def map_over_cores(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> Iterator[_Result]:
    """The results of `work`, in the order of tasks: by a copy of this process for each core, or here if there is one.

    Tasks and results are pickled, `work` and what it holds are not; it has torch with one thread. What it raises is
    raised here. Raises UserError if a copy was killed. Where a process cannot be copied (macOS), threads do it.
    """
    workers = min(owned_cores(), len(tasks))
    if workers < 2:
        yield from map(work, tasks)
        return
    with _executor(workers, work) as pool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside threads
                results = pool.map(_do, tasks)
            yield from results
        except BrokenProcessPool as error:
            raise UserError(
                "a process that worked beside this one was killed: the same command begins anew; if memory is short, "
                "start it with fewer cores (taskset --cpu-list 0)"
            ) from error


def leave_signals_to(program: int) -> None:
    """In a copy of the process `program`: leave signals to it, and die with it.

    A scheduler signals every process of a job: a copy that died of it would end training before it has saved.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal_at_death_of_parent(signal.SIGKILL)
    if os.getppid() != program:  # killed in between
        os.kill(os.getpid(), signal.SIGKILL)


def _executor(workers: int, work: Callable[[Any], Any]) -> Executor:
    if sys.platform == "linux":
        begin = (work, os.getpid())
        with suppress(OSError, NotImplementedError):  # a container without /dev/shm, where its semaphores would be
            return ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_begin, initargs=begin)
    return ThreadPoolExecutor(workers, initializer=_work.set, initargs=(work,))


def _begin(work: Callable[[Any], Any], program: int) -> None:
    leave_signals_to(program)
    torch.set_num_threads(1)  # a copy lacks the other threads, and would wait for them
    _work.set(work)


def _do(task: Any) -> Any:
    return _work.get()(task)
