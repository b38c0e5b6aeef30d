"""Work for all cores, by copies of a process: threads take turns where much of the work is Python."""

import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from lockstep.errors import UserError
from lockstep.launch.machine import signal_at_death_of_parent
from lockstep.launch.threads import allowed_cores

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def map_over_cores(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> Iterator[_Result]:
    """The results of `work`, in the order of tasks: by a copy of this process for each core, or here if there is one.

    Of the cores of this machine's other processes, too: they wait for this one.
    Results are pickled, `work` and tasks are not; it has torch with one thread. What it raises is raised here. Raises
    UserError if a copy was killed. Where a process cannot be copied (macOS, no room for it), threads do it.

    No ProcessPoolExecutor: it ends copies by SIGTERM, which they leave to the program, and shares locks among them,
    which a killed one keeps: both hung.
    """
    workers = min(allowed_cores(), len(tasks))
    if workers < 2:
        yield from map(work, tasks)
        return
    with copies_at_work(work, tasks, workers) as results:
        if results:
            yield from (received(results[index % workers]) for index in range(len(tasks)))
            return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(work, tasks)


@contextmanager
def copies_at_work(work: Callable[[Any], Any], tasks: Sequence[Any], number: int) -> Iterator[list[Connection]]:
    """Where results of copies of this process come from: the first has every `number`th task from the first on.

    An empty list where there can be no copies (see `map_over_cores`). They are gone at its end.
    """
    copies: list[BaseProcess] = []
    results: list[Connection] = []
    try:
        try:
            for first in range(number if sys.platform == "linux" else 0):
                _begin(work, tasks[first::number], copies, results)
        except OSError:
            _end(copies, results)
            results = []
        yield results
    finally:
        _end(copies, results)


def received(results: Connection, most_seconds: float | None = None) -> Any:
    """The next result of a copy; raises what that raised, UserError if the copy was killed, and TimeoutError."""
    if not results.poll(most_seconds):
        raise TimeoutError(f"no result after {most_seconds:.0f} seconds")
    try:
        result, error = results.recv()
    except (EOFError, OSError) as end:
        raise UserError(
            "a process that worked beside this one was killed: the same command begins anew; if memory is short, "
            "start it with fewer cores (taskset --cpu-list 0)"
        ) from end
    if error is not None:
        raise error
    return result


def leave_signals_to(program: int) -> None:
    """In a copy of the process `program`: leave signals to it, and die with it.

    A scheduler signals every process of a job: a copy that died of it would end training before it has saved.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal_at_death_of_parent(signal.SIGKILL)
    if os.getppid() != program:  # killed in between
        os.kill(os.getpid(), signal.SIGKILL)


def _begin(
    work: Callable[[Any], Any], tasks: Sequence[Any], copies: list[BaseProcess], results: list[Connection]
) -> None:
    own, theirs = Pipe(duplex=False)
    results.append(own)
    with theirs:  # closed before the next copy could inherit it: its end is seen when the one that writes is killed
        process = get_context("fork").Process(target=_do, args=(os.getpid(), work, tasks, results, theirs), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside threads
            process.start()
        copies.append(process)


def _end(copies: list[BaseProcess], results: list[Connection]) -> None:
    for copy in copies:
        copy.kill()
    for copy in copies:
        copy.join()
    for own in results:
        own.close()


def _do(
    program: int, work: Callable[[Any], Any], tasks: Sequence[Any], others: list[Connection], results: Connection
) -> None:
    """What a copy does."""
    leave_signals_to(program)
    for other in others:  # a program that has closed its own wants no more: nothing may keep it open
        other.close()
    torch.set_num_threads(1)  # a copy lacks the other threads, and would wait for them
    try:
        for task in tasks:
            results.send((work(task), None))
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        error.add_note(f"In a copy of the process:\n{told}")
        results.send((None, error if _travels(error) else RuntimeError(told)))


def _travels(error: Exception) -> bool:
    """Whether it can be pickled, and be read again: one of a class within a function cannot."""
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), type(error))
    except Exception:
        return False
