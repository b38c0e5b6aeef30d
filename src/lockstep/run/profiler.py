"""A trace of a few steps, written by torch's profiler."""

import warnings
from pathlib import Path

import torch

from lockstep.launch.accelerator import Launch
from lockstep.settings.config import RuntimeConfig


class Profiler:
    """With `runtime.profile`, steps 10 to 15 of this start leave a trace in `<run>/profile`; else nothing happens."""

    def __init__(self, config: RuntimeConfig, run_dir: Path, launch: Launch) -> None:
        self._profile = None
        if config.profile and launch.is_main:
            # torch 2.11 tells of later cycles, of which there are none.
            warnings.filterwarnings("ignore", message="Warning: Profiler clears events", category=UserWarning)
            schedule = torch.profiler.schedule(wait=8, warmup=1, active=6, repeat=1)
            write = torch.profiler.tensorboard_trace_handler(str(run_dir / "profile"))
            self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
            self._profile.start()

    def step(self) -> None:
        """Call at the end of every step."""
        if self._profile is not None:
            self._profile.step()
