"""Where a process is, read off the stacks of its threads."""

import gc
import importlib.util
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
from programs import ROOT

from lockstep.launch import stack
from lockstep.launch.stack import START, place

PACKAGES = Path(inspect.getfile(stack)).parents[2], Path(importlib.util.find_spec("torch").origin).parents[1], ROOT  # type: ignore


def defined_functions(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant.co_name
            yield from defined_functions(constant)


@pytest.mark.parametrize("spot", [*((file, function) for _, file, function in stack._PHASES), *stack._WAITS])
def test_what_is_looked_for_exists(spot: tuple[str, str]) -> None:
    """A function that was renamed would be looked for in vain."""
    file, function = spot
    (path,) = [folder / file for folder in PACKAGES if (folder / file).is_file()]
    names = set(defined_functions(compile(path.read_text(), str(path), "exec")))
    assert not function or function in names


@contextmanager
def main_thread_in(monkeypatch: pytest.MonkeyPatch, *frames: tuple[str, str]) -> Iterator[None]:
    """As if the main thread were there: (file, function) from the outermost to the innermost."""
    frame: Any = None
    for number, (file, function) in enumerate(frames):
        frame = SimpleNamespace(
            f_code=SimpleNamespace(co_filename=file, co_name=function), f_back=frame, f_lineno=number
        )
    monkeypatch.setattr("threading.main_thread", lambda: SimpleNamespace(ident=-1))
    monkeypatch.setattr("sys._current_frames", lambda: {-1: frame, threading.get_ident(): None})
    yield
    monkeypatch.undo()


FIT = ("/home/me/lockstep/train.py", "fit")
SRC = "/site-packages/lockstep"


@pytest.mark.parametrize(
    ("frames", "phase", "waits"),
    [
        ([("train.py", "begin"), (f"{SRC}/data/loader.py", "__init__")], START, False),
        ([("train.py", "fit")], "loop", False),
        ([FIT, (f"{SRC}/data/loader.py", "_stream"), ("/torch/utils/data/dataloader.py", "_get_data")], "data", False),
        ([FIT, ("/torch/nn/modules/module.py", "_call_impl"), ("/torch/nn/conv.py", "forward")], "forward", False),
        ([FIT, ("/accelerate/accelerator.py", "backward"), ("/torch/autograd/graph.py", "_engine")], "backward", False),
        (
            [FIT, ("/accelerate/accelerator.py", "backward"), (f"{SRC}/training/gradients.py", "exchange"),
             (f"{SRC}/training/tree.py", "add_up")],
            "gradient exchange",
            True,
        ),
        ([FIT, (f"{SRC}/report/milestones.py", "validate"), ("/torch/nn/modules/module.py", "f")], "evaluation", False),
        (
            [FIT, (f"{SRC}/report/milestones.py", "validate"), (f"{SRC}/report/milestones.py", "save"),
             (f"{SRC}/run/checkpoint.py", "wait")],
            "save",
            False,
        ),
        (
            [FIT, (f"{SRC}/report/milestones.py", "log"), ("/torch/distributed/distributed_c10d.py", "all_gather")],
            "log",
            True,
        ),
    ],
)  # fmt: skip
def test_the_phase_is_that_of_the_main_thread(
    frames: list[tuple[str, str]], phase: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with main_thread_in(monkeypatch, *frames):
        here = place()
    assert (here.phase, here.waits) == (phase, waits)
    innermost = frames[-1]
    assert here.stack.startswith(f"{'/'.join(innermost[0].split('/')[-2:])}:{len(frames) - 1} {innermost[1]}")


def test_a_real_thread_is_seen_where_it_is() -> None:
    """From another thread, as the watch looks."""
    seen: list[stack.Place] = []

    def look(then: Callable[[], None]) -> None:
        seen.append(place())
        then()

    done = threading.Event()
    threading.Thread(target=look, args=(done.set,)).start()
    done.wait(10)
    assert "threading.py" in seen[0].stack and "test_a_real_thread_is_seen" in seen[0].stack
    assert seen[0].phase == START and not seen[0].waits


def test_looking_keeps_nothing_alive() -> None:
    """Tensors of a step, or workers that decode, would stay until the next garbage collection."""

    class Tensor:
        pass

    def step() -> "weakref.ref[Tensor]":
        tensor = Tensor()
        watch = threading.Thread(target=place)
        watch.start()
        watch.join()
        return weakref.ref(tensor)

    gc.disable()
    try:
        assert step()() is None
    finally:
        gc.enable()
