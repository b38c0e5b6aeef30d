"""Where a process is: the phase of training, read off the stack of its threads, which costs the loop nothing."""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

START = "the start"
"""Everything before the loop, which may take one process long while the others wait: decoding images, say"""

_PHASES = (
    (START, "train.py", "begin"),
    ("report", "lockstep/report/summary.py", ""),
    ("save", "lockstep/report/milestones.py", "save"),
    ("evaluation", "lockstep/evaluation/evaluate.py", ""),
    ("evaluation", "lockstep/report/milestones.py", "validate"),
    ("evaluation", "lockstep/report/milestones.py", "finish"),
    ("log", "lockstep/report/milestones.py", "log"),
    ("data", "lockstep/data/loader.py", ""),
    ("augmentation", "lockstep/augment/transform.py", ""),
    ("gradient exchange", "lockstep/training/gradients.py", "exchange"),
    ("backward", "accelerate/accelerator.py", "backward"),
    ("batch statistics", "lockstep/training/batchnorm.py", "commit"),
    ("question whether to stop", "lockstep/launch/preemption.py", "agreed"),
    ("forward", "torch/nn/modules/module.py", ""),
    ("loop", "train.py", "fit"),
)
"""Phase, file and function ("": any): the first that is found anywhere on the stack of the main thread counts"""

_WAITS = (
    ("torch/nn/parallel/distributed.py", "_pre_forward"),
    ("lockstep/training/tree.py", "add_up"),
    ("lockstep/training/tree.py", "finish"),
    ("lockstep/training/meter.py", "read"),
    ("lockstep/evaluation/evaluate.py", "evaluate"),
    ("lockstep/report/milestones.py", "log"),
    ("lockstep/launch/preemption.py", "_answer"),
)
"""File and function of the innermost frame of a thread that waits for other processes, or for a device that does"""

_COLLECTIVES = "/torch/distributed/"
"""So does one whose innermost frame is in a file of this folder"""

_SHOWN_FRAMES = 4


@dataclass(frozen=True)
class Place:
    """Where a process is."""

    phase: str
    waits: bool
    """For other processes, or for a device that does"""
    stack: str
    """The innermost frames of the main thread, `file:line function`, the innermost first"""


def place() -> Place:
    """Where this process is; called from another thread than the main one."""
    frames = sys._current_frames()
    # With this function's own frame among them they would be a cycle: a step's tensors, and the workers that decode,
    # would stay until the next garbage collection.
    del frames[threading.get_ident()]
    main = list(_outwards(frames[threading.main_thread().ident or 0]))
    phase = next((phase for phase, *spot in _PHASES if any(_is_at(frame, *spot) for frame in main)), START)
    waits = any(map(_waits, frames.values()))
    return Place(phase, waits, " < ".join(map(_described, main[:_SHOWN_FRAMES])))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_at(frame: FrameType, file: str, function: str) -> bool:
    return function in ("", frame.f_code.co_name) and f"/{frame.f_code.co_filename}".endswith(f"/{file}")


def _waits(innermost: FrameType) -> bool:
    return _COLLECTIVES in innermost.f_code.co_filename or any(_is_at(innermost, *spot) for spot in _WAITS)


def _described(frame: FrameType) -> str:
    file = "/".join(frame.f_code.co_filename.split("/")[-2:])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
