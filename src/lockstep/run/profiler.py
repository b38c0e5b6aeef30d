"""A trace of a few steps, and a table of what took their time, written by torch's profiler."""

import warnings
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from lockstep.files import replace_file
from lockstep.launch.accelerator import Launch
from lockstep.settings.config import RuntimeConfig

TABLE = "operations.md"
_QUIET_STEPS, _ACTIVE_STEPS = 9, 6
_ROWS = 25


class Profiler:
    """With `runtime.profile`, steps 10 to 15 of this start leave a trace and a table in `<run>/profile`; else nothing.

    The trace is for TensorBoard or Perfetto, the table for reading.
    """

    def __init__(self, config: RuntimeConfig, run_dir: Path, launch: Launch) -> None:
        self._profile, self._has_written = None, False
        self._folder, self._launch = run_dir / "profile", launch
        if config.profile and launch.is_main:
            # torch 2.11 tells of later cycles, of which there are none.
            warnings.filterwarnings("ignore", message="Warning: Profiler clears events", category=UserWarning)
            schedule = torch.profiler.schedule(wait=_QUIET_STEPS - 1, warmup=1, active=_ACTIVE_STEPS, repeat=1)
            self._profile = profile(schedule=schedule, on_trace_ready=self._write)
            self._profile.start()

    def step(self) -> None:
        """Call at the end of every step."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Call when training ends: without a trace, it says why there is none."""
        if self._profile is not None and not self._has_written:
            first, last = _QUIET_STEPS + 1, _QUIET_STEPS + _ACTIVE_STEPS
            self._launch.say(f"note: --runtime.profile looks at steps {first} to {last} of a start: this one had fewer")

    def _write(self, done: profile) -> None:
        torch.profiler.tensorboard_trace_handler(str(self._folder))(done)
        table = operations_table(done, _ACTIVE_STEPS)
        replace_file(self._folder / TABLE, table.encode())
        self._has_written = True
        self._launch.say(f"profiled {_ACTIVE_STEPS} steps into {self._folder}; most of their time:\n{_head(table)}")


def operations_table(done: profile, steps: int) -> str:
    """What took the time of `steps` profiled steps, as a Markdown table: on the device if there is one, else the host.

    Times are those of an operation itself, without others that it calls.
    """
    # A kernel of a GPU is an event, too, beside the operation that it is counted with.
    events = [event for event in done.key_averages() if event.device_type == DeviceType.CPU]
    on_device = any(event.self_device_time_total for event in events)
    times = {
        event.key: (event.self_device_time_total if on_device else event.self_cpu_time_total, event.count)
        for event in events
        if not event.key.startswith("ProfilerStep")
    }
    whole = sum(time for time, _ in times.values()) or 1.0
    rows = sorted(times.items(), key=lambda item: -item[1][0])[:_ROWS]
    lines = [
        f"| operation | share of {'device' if on_device else 'CPU'} time | ms a step | calls a step |",
        "|---|---|---|---|",
    ]
    for name, (time, count) in rows:
        lines.append(f"| {name} | {time / whole:.1%} | {time / 1e3 / steps:.2f} | {count / steps:g} |")
    return "\n".join(lines) + "\n"


def _head(table: str) -> str:
    """The first rows."""
    return "\n".join(table.splitlines()[:7])
