"""What torch.compile gains for this network, on this machine."""

import time
from dataclasses import replace
from statistics import median

from accelerate import Accelerator

from lockstep.data.images import Data
from lockstep.data.loader import Batch
from lockstep.errors import UserError
from lockstep.launch.accelerator import Launch
from lockstep.settings.config import Config
from lockstep.training.learner import Learner, blank_batch, build_learner

_TRIALS = 7


def say_gain_of_compiling(
    config: Config, data: Data, accelerator: Accelerator, launch: Launch, micro_batch_size: int
) -> None:
    """Say how long compiling took and what it gains, from microbatches tried on throw-away parts.

    Nothing if nothing is compiled. What was compiled is kept: the training's own network finds it. Raises UserError
    where this machine cannot compile, or accumulation would use what a CUDA graph overwrites.
    """
    mode = config.runtime.compile
    if mode == "off":
        return
    if mode == "reduce-overhead" and config.train.batch_size > micro_batch_size * launch.num_processes:
        raise UserError(
            "--runtime.compile=reduce-overhead keeps gradients where the next microbatch overwrites them: set "
            "--train.micro_batch_size so that a step has one on each process, or --runtime.compile=default"
        )
    plain = replace(config, runtime=replace(config.runtime, compile="off"))
    seconds = {}
    for name, settings in (("off", plain), (mode, config)):
        learner = build_learner(settings, data, accelerator, launch.alone(), resumes=True)
        try:
            first, seconds[name] = _seconds_of_microbatch(learner, data, micro_batch_size)
        finally:
            accelerator.free_memory()  # it keeps what it has prepared
    gain = seconds["off"] / seconds[mode]
    line = f"--runtime.compile={mode}: compiled in {first:.0f} s; a microbatch of {micro_batch_size} takes "
    line += f"{1e3 * seconds[mode]:.1f} ms, {1e3 * seconds['off']:.1f} ms without: {gain:.2f} times as fast"
    launch.say(line if gain >= 1 else f"{line}. Set --runtime.compile=off")


def _seconds_of_microbatch(learner: Learner, data: Data, size: int) -> tuple[float, float]:
    """Of the first forward and backward, and the median of some later ones."""
    batch = blank_batch(data, size, learner.launch.device)
    try:
        first = _timed(learner, batch)
    except RuntimeError as error:
        if "No working C++ compiler" not in str(error):
            raise
        raise UserError("--runtime.compile needs a C++ compiler such as g++, and finds none: set it to off") from error
    return first, median(_timed(learner, batch) for _ in range(_TRIALS))


def _timed(learner: Learner, batch: Batch) -> float:
    begun = time.perf_counter()
    learner.rehearse(batch).item()  # which waits for the device
    learner.optimizer.zero_grad()
    return time.perf_counter() - begun
