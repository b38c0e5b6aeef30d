"""The Accelerator and the process groups of this process, and what is in force for it."""

import atexit
import gc
import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import distributed

from lockstep.errors import UserError, print_line
from lockstep.launch.guards import (
    refuse_lonely_launch,
    refuse_odd_ranks,
    refuse_other_loops,
    require_world_size,
    resolve_precision,
    resolve_sharding,
)
from lockstep.launch.imports import leave_compiler_out
from lockstep.launch.kernels import choose_kernels
from lockstep.launch.machine import end_with_launcher, keep_freed_memory, tell_of_crashes
from lockstep.launch.rendezvous import meet
from lockstep.launch.threads import choose_threads, owned_cores
from lockstep.launch.watch import Watch
from lockstep.settings.config import RuntimeConfig

_COLLECTIVE_TIMEOUT_SECONDS = 1800
_WATCHED_TIMEOUT_SECONDS = 24 * 3600
"""Where the watch ends what stands still, a process may prepare data for as long as it takes"""

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Launch:
    """What is in force for this process."""

    device: torch.device
    num_processes: int
    process_index: int
    local_process_index: int
    precision: str
    cores: int
    """CPU cores this process may use as its own"""
    fsdp: bool = False
    """FSDP2 is asked for"""
    host_group: Any = None
    """Process group of its own for messages between hosts (gloo, also where gradients go by NCCL); None: one process"""
    watch: Watch | None = None
    """Names the process that the others wait for; None: one process, or datagrams do not come through"""

    @property
    def is_main(self) -> bool:
        return self.process_index == 0

    @property
    def is_sharded(self) -> bool:
        """Whether weights are cut among processes."""
        return self.fsdp and self.num_processes > 1

    @property
    def precision_name(self) -> str:
        return "fp32" if self.precision == "no" else self.precision

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print_line(text)

    def alone(self) -> "Launch":
        """This process as if there were no others."""
        return replace(self, num_processes=1, process_index=0, host_group=None, watch=None)

    def follow(self, step_of: Callable[[], int]) -> None:
        """Let the watch say at which step this process is."""
        if self.watch is not None:
            self.watch.step_of = step_of

    def decide(self, choose: Callable[[], Choice]) -> Choice:
        """What `choose` returns on the main process, told to all others; a UserError of its is raised on all alike."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = choose()
            except UserError as mistake:
                outcome[1] = mistake
        if self.host_group is not None:
            distributed.broadcast_object_list(outcome, src=0, group=self.host_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, own: Any) -> list[Any]:
        """What every process has, by rank: told among hosts, never through the device; every process must take part."""
        gathered = [own] * self.num_processes
        if self.host_group is not None:
            distributed.all_gather_object(gathered, own, group=self.host_group)
        return gathered

    def require_alike(self, what: str, own: Mapping[str, Any]) -> None:
        """Raise UserError, on every process alike, if `own` is not the same on all; every process must take part."""
        places = self.gather((platform.node(), dict(own)))
        _, first = places[0]
        for rank, (host, other) in enumerate(places):
            changes = [
                f"{key} {first.get(key)} -> {other.get(key)}"
                for key in first | other
                if first.get(key) != other.get(key)
            ]
            if changes:
                raise UserError(f"rank {rank} ({host}) has other {what} than rank 0: {', '.join(changes[:4])}")

    def as_dict(self, microbatches: int) -> dict[str, Any]:
        """For environment.json."""
        return {
            "device": self.device.type,
            "processes": self.num_processes,
            "accumulation": -(-microbatches // self.num_processes),
            "fsdp": self.is_sharded,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }

    def describe(self, batch_size: int, micro_batch_size: int) -> str:
        """One line: device, precision, processes, accumulation (the most of any process)."""
        microbatches = batch_size // micro_batch_size
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        processes += " (FSDP2)" if self.is_sharded else ""
        each = -(-microbatches // self.num_processes)
        shares = f"{self.num_processes} (processes) x {each} (accumulation)"
        if microbatches % self.num_processes:
            shares = f"{microbatches} (microbatches), at most {each} on one of {self.num_processes} processes"
        threads = torch.get_num_threads()
        return (
            f"{self.device.type}, {self.precision_name}, {processes}, "
            f"{threads} CPU thread{'s' * (threads > 1)} each; a step is {batch_size} samples = "
            f"{micro_batch_size} (microbatch) x {shares}"
        )


def build_accelerator(config: RuntimeConfig) -> tuple[Accelerator, Launch]:
    """Start the process group; raises UserError, naming a launch that works, if this one is not what it seems."""
    refuse_odd_ranks()
    refuse_other_loops()
    end_with_launcher()
    tell_of_crashes()
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    choose_kernels(config, on_cpu=on_cpu)
    precision = resolve_precision(config, on_cpu)
    refuse_lonely_launch()
    shards = resolve_sharding(config, precision)
    accelerator, host_group = _connect(config, precision, on_cpu)
    require_world_size(accelerator)
    if config.compile == "off":
        leave_compiler_out()
    cores = owned_cores()
    choose_threads(config, cores)
    if on_cpu:
        keep_freed_memory()
    launch = Launch(
        accelerator.device,
        accelerator.num_processes,
        accelerator.process_index,
        accelerator.local_process_index,
        precision,
        cores,
        fsdp=shards,
        host_group=host_group,
    )
    return accelerator, replace(launch, watch=_watch(launch, config))


def _watch(launch: Launch, config: RuntimeConfig) -> Watch | None:
    """Begin to watch, where there are several processes, and set how long they may wait for one another from now on."""
    if launch.host_group is None:
        return None
    watch = Watch(launch.process_index, launch.gather, config.stuck_seconds)
    if watch.is_on:
        watch.start()
    else:
        launch.say("note: no datagrams (UDP) between these processes: a rank that hangs will not be named")
    # One process may prepare data for long while the others wait.
    seconds = _WATCHED_TIMEOUT_SECONDS if watch.is_on else _COLLECTIVE_TIMEOUT_SECONDS
    groups: tuple[Any, Any] = distributed.group.WORLD, launch.host_group
    for group in groups:
        group.set_timeout(timedelta(seconds=seconds))
    return watch if watch.is_on else None


def _connect(config: RuntimeConfig, precision: str, on_cpu: bool) -> tuple[Accelerator, Any]:
    """Build both process groups, the second one for messages between hosts; UserError if other processes do not come.

    Without a launcher nobody ends the ones that wait. Measured with torch 2.15: a process whose peer was killed while
    they connected notices after one to three times the wait, because it tries again.
    """
    wait = timedelta(seconds=config.rendezvous_seconds)
    meeting = meet(config.rendezvous_seconds)
    choice = {} if config.backend == "auto" else {"backend": config.backend}
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=wait, **choice)],
        )
        if accelerator.num_processes == 1:
            return accelerator, None
        host_group = distributed.new_group(backend="gloo", timeout=wait)
        accelerator.wait_for_everyone()  # NCCL connects in its first collective
        del meeting
        return accelerator, host_group
    except (ValueError, ImportError) as failure:
        raise UserError(f"Accelerate cannot use what its launcher left in the environment: {failure}") from failure
    except RuntimeError as failure:
        line = _describe_failed_connection(failure, config)
        if line is None:
            raise
        raise UserError(line) from failure


def _describe_failed_connection(failure: RuntimeError, config: RuntimeConfig) -> str | None:
    """One line if processes did not connect; None for an error of another kind."""
    text = str(failure)
    networks = distributed.DistStoreError, distributed.DistNetworkError
    if not isinstance(failure, networks) and "gloo" not in text.lower():
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, world_size, address, port = (os.environ.get(name, "?") for name in names)
    return (
        f"process {rank} of {world_size} did not reach the others at {address}:{port} "
        f"({text.splitlines()[0].rstrip('.')}): one of them may have ended, or need longer than "
        f"--runtime.rendezvous_seconds={config.rendezvous_seconds}"
    )


def leave_group() -> None:
    """Call when all is done and saved: ignore signals that come too late, wait for what processes still send.

    The exit of the interpreter would give signals their defaults again: a finished job counted as killed by its
    scheduler's. With the process group in place, or kept alive by a reference cycle, some exits were aborted: one of 30
    trainings of two processes, two of 6 sharded ones.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def end_program(code: int = 0) -> NoReturn:
    """Leave the group, and end with this exit code.

    What libraries want done at the exit is done; the interpreter does not take torch apart, which it needs
    1.5 s for (2-core AMD EPYC, torch 2.15).
    """
    leave_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
