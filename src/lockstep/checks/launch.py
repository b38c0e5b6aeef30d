"""Checks of how the processes were started, and whether they reach one another."""

import os
import socket
import time

import torch

from lockstep.checks.finding import NO_LAUNCH, Finding, Parts, time_limit
from lockstep.data.loader import choose_workers
from lockstep.data.sampler import propose_micro_batch_size, resolve_micro_batch_size
from lockstep.launch.accelerator import Launch, build_accelerator
from lockstep.launch.guards import quicker_precision

CONNECT_SECONDS = 120.0  # for all processes to find each other, and for one all-reduce
_DEFAULT_PORT = 29500  # accelerate's and torchrun's
_CONNECT_REMEDY = "start the same command on every machine, and look at the address, the port and the firewall"


def check_launch(parts: Parts) -> Finding:
    """Start the process group: its size, the device and the precision are what was asked for."""
    try:
        with time_limit(CONNECT_SECONDS, "launch", f"not all processes connected at {_address()}: {_CONNECT_REMEDY}"):
            parts.accelerator, launch = build_accelerator(parts.config.runtime)
    except Exception as problem:
        if "EADDRINUSE" not in str(problem):
            raise
        remedy = f"end what listens there, or launch with --main_process_port {_free_port()}"
        return Finding("failed", f"port {_address()} on the main process is taken: {remedy}")
    parts.launch = launch
    precision = launch.precision_name if parts.config.runtime.dtype == "float32" else "fp64"
    text = f"{launch.num_processes} process{'es' * (launch.num_processes > 1)} on {launch.device.type} in {precision}"
    if advice := quicker_precision(parts.config.runtime, launch.precision, launch.device.type == "cpu"):
        return Finding("warning", f"{text}, but {advice}")
    return Finding("ok", text)


def check_batch(parts: Parts) -> Finding:
    """The global batch divides into microbatches and processes."""
    if parts.launch is None:
        return NO_LAUNCH
    batch_size, processes = parts.config.train.batch_size, parts.launch.num_processes
    parts.micro_batch_size = micro = resolve_micro_batch_size(parts.config, processes)
    microbatches = batch_size // micro
    each = -(-microbatches // processes)
    text = (
        f"a step is {batch_size} samples = {microbatches} microbatches of {micro}, up to {each} for each of {processes}"
    )
    if parts.config.train.micro_batch_size is not None:
        return Finding("ok", text)
    proposed = propose_micro_batch_size(batch_size, processes)
    return Finding(
        "warning",
        f"{text}; --train.micro_batch_size is left open, so that the result belongs to this number of processes: with "
        f"--train.micro_batch_size={proposed}, any number up to {batch_size // proposed} trains the same",
    )


def check_cores(parts: Parts) -> Finding:
    """CPU threads and data workers against the cores that this process may use."""
    if parts.launch is None:
        return NO_LAUNCH
    cores, threads = parts.launch.cores, torch.get_num_threads()
    spare, workers = max(cores - 1, 0), choose_workers(parts.config.data, parts.launch)
    machine, neighbours = len(os.sched_getaffinity(0)), _local_processes(parts.launch)
    problems = []
    if neighbours > machine:
        problems.append(f"{neighbours} processes share {machine} cores: launch at most {machine}")
    if threads > cores:
        problems.append(f"{threads} CPU threads for {cores} cores per process: set --runtime.threads={cores}")
    if workers > cores:
        problems.append(f"{workers} data workers for {cores} cores per process: set --data.workers={spare}")
    if problems:
        return Finding("warning", "; ".join(problems))
    return Finding("ok", f"each process has {cores}, for CPU threads: {threads}, data workers: {workers}")


def check_port(parts: Parts) -> Finding | None:
    """The port at which processes connect: several have proved it, for one it is tried."""
    if not parts.is_main:
        return None
    if parts.launch is None and "RANK" in os.environ:
        return NO_LAUNCH
    if parts.launch and parts.launch.num_processes > 1:
        return Finding("ok", f"{parts.launch.num_processes} processes connected at {_address()}")
    given = os.environ.get("MASTER_PORT", str(_DEFAULT_PORT))
    port = int(given) if given.isdecimal() else 0
    if not 0 < port < 65536:
        what = f"MASTER_PORT={given!r} in the environment is no port"
        return Finding("warning", f"{what} (one process needs none): unset it")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            remedy = f"launch several processes with --main_process_port {_free_port()}"
            return Finding("warning", f"port {port} is taken (one process needs none): {remedy}")
    return Finding("ok", f"port {port} is free")


def check_all_reduce(parts: Parts) -> Finding | None:
    """Processes can add up a tensor, and get the right sum."""
    if parts.launch is None or parts.accelerator is None:
        return NO_LAUNCH
    processes = parts.launch.num_processes
    if processes == 1:
        return None
    start = time.perf_counter()
    with time_limit(CONNECT_SECONDS, "all-reduce", f"no answer from other processes: {_CONNECT_REMEDY}"):
        own = torch.full((1024,), parts.launch.process_index + 1.0, device=parts.launch.device)
        total = parts.accelerator.reduce(own, reduction="sum")[-1].item()
    seconds = time.perf_counter() - start
    expected = processes * (processes + 1) // 2
    if total != expected:
        return Finding("failed", f"1 + ... + {processes} came to {total:g} instead of {expected}: {_CONNECT_REMEDY}")
    return Finding("ok", f"{processes} processes added up to {total:g}, in {seconds:.3f} s")


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', _DEFAULT_PORT)}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _local_processes(launch: Launch) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", launch.num_processes))
