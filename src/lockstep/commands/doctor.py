"""Look, in seconds, at everything a long job needs: `lockstep doctor [train.py's arguments]`.

Put it where train.py stands, `accelerate launch [options] -m lockstep doctor [...]`, to examine that very launch. Every
process runs every check and the main process prints one line for each: ok, warning, failed or skipped, what was found,
and what to do. The exit code is 1 if something failed. No run folder is made and nothing is left behind, except
downloads of the data set and pretrained weights, and the index of tar shards. All training is thrown away, and no image
is decoded that one step does not need.
"""

import math
import os
import shutil
import socket
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lockstep.data.images import Data, build_data
from lockstep.data.loader import TrainLoader, choose_workers
from lockstep.data.sampler import build_sampler, propose_micro_batch_size, resolve_micro_batch_size
from lockstep.errors import UserError, first_line, is_first_of_machine
from lockstep.files import path_of
from lockstep.launch.accelerator import Launch, build_accelerator
from lockstep.launch.machine import has_fast_bf16
from lockstep.models.network import build_network
from lockstep.models.summary import count_parameters
from lockstep.run.accelerate import require_trackers
from lockstep.run.checkpoint import saved_steps
from lockstep.run.folder import Run, open_run
from lockstep.settings.cli import parse_config, run_dir_of
from lockstep.settings.config import Config
from lockstep.training.learner import Learner, build_learner, complete

CONNECT_SECONDS = 120.0  # for all processes to find each other, and for one all-reduce
CHECK_SECONDS = 900.0  # for one check on the slowest process: it may download a data set
WANDB_SECONDS = 10
_FIRST_PROCESS_SPEAKS_SECONDS = 30
_DEFAULT_PORT = 29500  # accelerate's and torchrun's
_PROBES = 4  # images whose pixels are compared between processes
_LONG_PASS_SECONDS = 5.0
_CONNECT_REMEDY = "start the same command on every machine, and look at the address, the port and the firewall"

Status = Literal["ok", "skipped", "warning", "failed"]
_SEVERITY: tuple[Status, ...] = ("ok", "skipped", "warning", "failed")


class Finding(NamedTuple):
    """What a check found."""

    status: Status
    text: str


@dataclass
class Parts:
    """What the checks have built so far, for those that come after; None where that failed."""

    config: Config
    accelerator: Accelerator | None = None
    launch: Launch | None = None
    micro_batch_size: int | None = None
    run: Run | None = None
    data: Data | None = None
    signature: dict[str, int | str] | None = None
    learner: Learner | None = None

    @property
    def is_main(self) -> bool:
        return self.launch is None or self.launch.is_main


Check = Callable[[Parts], Finding | None]
"""None: nothing to say on this process"""

_NO_LAUNCH = Finding("skipped", "the launch failed")


# ---- launch


def check_launch(parts: Parts) -> Finding:
    """Start the process group: its size, the device and the precision are what was asked for."""
    try:
        with _time_limit(CONNECT_SECONDS, "launch", f"not all processes connected at {_address()}: {_CONNECT_REMEDY}"):
            parts.accelerator, launch = build_accelerator(parts.config.runtime)
    except Exception as problem:
        if "EADDRINUSE" not in str(problem):
            raise
        remedy = f"end what listens there, or launch with --main_process_port {_free_port()}"
        return Finding("failed", f"port {_address()} on the main process is taken: {remedy}")
    parts.launch = launch
    precision = launch.precision_name if parts.config.runtime.dtype == "float32" else "fp64"
    text = f"{launch.num_processes} process{'es' * (launch.num_processes > 1)} on {launch.device.type} in {precision}"
    if precision == "fp32" and has_fast_bf16(launch.device.type == "cpu"):
        return Finding("warning", f"{text}, but this device has fast bf16: set --runtime.precision=auto")
    return Finding("ok", text)


def check_choices(parts: Parts) -> Finding:
    """The network, optimizer, loss, schedule and trackers that the settings name exist."""
    parts.config = complete(parts.config, say=lambda _: None)
    require_trackers(parts.config.log.trackers)
    config = parts.config
    return Finding("ok", f"{config.model.name}, {config.optim.name}, {config.train.loss}, {config.schedule.name}")


def check_batch(parts: Parts) -> Finding:
    """The global batch divides into microbatches and processes."""
    if parts.launch is None:
        return _NO_LAUNCH
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
        return _NO_LAUNCH
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
        return _NO_LAUNCH
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
        return _NO_LAUNCH
    processes = parts.launch.num_processes
    if processes == 1:
        return None
    start = time.perf_counter()
    with _time_limit(CONNECT_SECONDS, "all-reduce", f"no answer from other processes: {_CONNECT_REMEDY}"):
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


# ---- data and network


def check_run(parts: Parts) -> Finding:
    """The run folder may be used with these settings."""
    if parts.launch is None:
        return _NO_LAUNCH
    run = parts.run = open_run(parts.config, parts.launch)
    if run.is_finished:
        return Finding("warning", run.describe_result())
    return Finding("ok", f"{run.path} will be {'continued' if run.has_checkpoint else 'a new run'}")


def check_data(parts: Parts) -> Finding:
    """The data set opens here and some of its images can be decoded."""
    # Read image by image: decoding a whole set into the cache would take long, and is not what is in doubt.
    quick = replace(parts.config, data=replace(parts.config.data, memory_budget=0))
    run_dir = parts.run.path if parts.run else path_of(parts.config.run.root) / "doctor-without-a-run"
    data = build_data(quick, run_dir, write=False)
    sets = {"train": data.train, "val": data.val, "test": data.test}
    signature: dict[str, int | str] = {"classes": len(data.classes), "class names": _checksum(repr(data.classes))}
    for name, images in sets.items():
        signature[f"{name} images"] = len(images) if images else 0
        signature[f"{name} labels"] = _checksum(images.labels.numpy().tobytes() if images else b"")
    chosen = torch.linspace(0, len(data.train) - 1, _PROBES).long().tolist()
    pixels = [data.train.load(index) for index in chosen]
    signature["pixels"] = _checksum(b"".join(b"" if image is None else image.numpy().tobytes() for image in pixels))
    parts.data, parts.signature = data, signature
    counts = ", ".join(f"{signature[f'{name} images']} {name}" for name in sets if signature[f"{name} images"])
    channels, height, width = data.image_shape
    return Finding("ok", f"{counts} images of {height}x{width}x{channels} in {len(data.classes)} classes")


def check_same_data(parts: Parts) -> Finding | None:
    """Every process sees the same classes, lengths, labels and pixels as the main one."""
    if parts.launch is None or parts.launch.num_processes == 1:
        return None
    main = gather_object([parts.signature])[0]
    if parts.signature is None or main is None:
        return Finding("skipped", "the data cannot be read")
    others = [f"{key} {value}, not {main[key]}" for key, value in parts.signature.items() if value != main[key]]
    if others:
        problem = "; ".join(others)
        return Finding("failed", f"not the data of rank 0 ({problem}): put the same files on every machine")
    return Finding("ok", f"classes, labels and pixels are the same on all {parts.launch.num_processes} processes")


def check_network(parts: Parts) -> Finding:
    """The network can be built, with its first weights, for images of this size."""
    if parts.data is None:
        return Finding("skipped", "the data cannot be read")
    name = parts.config.model.name
    if parts.launch is None or parts.accelerator is None:
        model = build_network(parts.config, parts.data, torch.device("cpu"), resumes=False)
        return Finding("ok", f"{name} with {count_parameters(model):,} parameters")
    resumes = parts.run is not None and parts.run.has_checkpoint
    # Alone, without DDP and shared batch statistics: a failure here must not hang the others.
    parts.learner = build_learner(parts.config, parts.data, parts.accelerator, parts.launch.alone(), resumes=resumes)
    return Finding("ok", f"{name} with {count_parameters(parts.learner.model):,} parameters")


def check_step(parts: Parts) -> Finding:
    """One microbatch forward and backward, and one update: memory suffices and the loss is finite."""
    if parts.launch is None or parts.accelerator is None:
        return _NO_LAUNCH
    if parts.learner is None or parts.data is None:
        return Finding("skipped", "there is no network")
    if parts.micro_batch_size is None:
        return Finding("skipped", "the global batch does not fit the launch")
    try:
        loss, seconds, accumulation = _train_once(parts)
        parts.learner.optimizer.step()
    except torch.OutOfMemoryError:
        remedy = f"lower --train.micro_batch_size={parts.micro_batch_size}"
        return Finding("failed", f"{parts.launch.device} has not enough memory for one microbatch: {remedy}")
    if not math.isfinite(loss):
        remedy = "look at --augment.mean and --augment.std, or set --runtime.precision=no"
        return Finding("failed", f"the first loss is {loss}: {remedy}")
    return Finding("ok", f"loss {loss:.3f}; about {seconds * accumulation:.3g} s per step, reading images not counted")


def _train_once(parts: Parts) -> tuple[float, float, int]:
    """Loss and seconds of this process's first microbatch, and the number of its microbatches per step."""
    config, data, launch = parts.config, parts.data, parts.launch
    assert data and launch and parts.learner and parts.micro_batch_size
    # One worker is enough to see whether workers start here.
    quick = replace(config, data=replace(config.data, workers=min(abs(config.data.workers), 1)))
    sampler = build_sampler(config, data.train.drawn_labels, parts.micro_batch_size)
    loader = TrainLoader(data.train, sampler, launch, quick)
    batch = next(loader.batches(range(1)))
    seconds = math.inf
    for _ in range(2):  # the first pass is slow everywhere: the second tells the time, unless that would be long
        start = time.perf_counter()
        loss = parts.learner.rehearse(batch).item()  # which waits for the device
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > _LONG_PASS_SECONDS:
            break
    return loss, seconds, loader.accumulation


def _checksum(content: str | bytes) -> str:
    return f"{zlib.crc32(content.encode() if isinstance(content, str) else content):08x}"


# ---- disk and W&B


def check_disk(parts: Parts) -> Finding | None:
    """The run folder's place can be written to and has room for the checkpoints to come."""
    if not parts.is_main:
        return None
    config = parts.config
    checkpoints = run_dir_of(config) / "checkpoints"
    place = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        reason = f"{place} cannot be written to ({problem.strerror or problem})"
        return Finding("failed", f"{reason}: set another --run.root, or make it a folder of yours with room")
    free = shutil.disk_usage(place).free
    if parts.learner is None:
        return Finding("ok", f"{place} can be written to; {_size(free)} free (without a network no need is known)")
    # The newest ones, the best one, and the one being written; those there already will make room for new ones.
    count = max(1, config.checkpoint.keep_last + 2 - len(saved_steps(checkpoints)))
    each = _checkpoint_bytes(parts.learner)
    folders = f"{count} checkpoint{'s' * (count > 1)} of {_size(each)}"
    text = f"{folders} need {_size(count * each)}; {place} has {_size(free)} free"
    if count * each > free:
        return Finding("failed", f"{text}: make room, set another --run.root, or lower --checkpoint.keep_last")
    return Finding("ok", text)


def _checkpoint_bytes(learner: Learner) -> int:
    model, optimizer, average = learner.model, learner.optimizer, learner.average
    if not optimizer.state:  # no step was possible: zero gradients make the same state
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    tensors = [*model.state_dict().values(), *(average.state_dict() if average else {}).values()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def check_wandb(parts: Parts) -> Finding | None:
    """What W&B will do: nothing, log here, or log to its server, which must answer and know the API key."""
    if not parts.is_main:
        return None
    wanted = parts.config.log.wandb
    if wanted == "disabled":
        return Finding("ok", "disabled by --log.wandb")
    import wandb

    forced: dict[str, Any] = {} if wanted == "auto" else {"mode": wanted}
    try:
        settings = wandb.setup(wandb.Settings(silent=True, console="off", **forced)).settings
        if settings.mode in ("disabled", "offline", "dryrun"):
            source = f"--log.wandb={wanted}" if forced else "the environment or `wandb offline`"
            return Finding("ok", f"{'disabled' if settings.mode == 'disabled' else 'offline'} by {source}")
        if not wandb.login(verify=False, prompt=False):  # never a question
            text = "no API key: the run will be logged offline; run `wandb login` once to log online"
            return Finding("ok" if wanted == "auto" else "warning", text)
        user = wandb.Api(timeout=WANDB_SECONDS).viewer.username
        return Finding("ok", f"online at {settings.base_url} as {user}, project {parts.config.log.project}")
    except Exception as problem:
        text = f"the server does not accept us ({first_line(problem)}): the run will be logged offline"
        return Finding("warning", f"{text}; look at the network, or run `wandb login` again")
    finally:
        _end_wandb(wandb.teardown)


def _end_wandb(teardown: Callable[[], object]) -> None:
    """End W&B's own process. Seen: one that did not end, for which W&B waits without limit."""
    leaving = threading.Thread(target=teardown, daemon=True)
    leaving.start()
    leaving.join(WANDB_SECONDS)
    if leaving.is_alive():
        for child in psutil.Process().children():
            if "wandb" in child.name():
                child.kill()
        leaving.join(WANDB_SECONDS)


# ---- all together

CHECKS: dict[str, Check] = {
    "launch": check_launch,
    "names": check_choices,
    "batch": check_batch,
    "cores": check_cores,
    "port": check_port,
    "all-reduce": check_all_reduce,
    "run": check_run,
    "data": check_data,
    "same data": check_same_data,
    "network": check_network,
    "step": check_step,
    "disk": check_disk,
    "W&B": check_wandb,
}


def examine(config: Config) -> dict[str, Finding]:
    """Run all checks and print a line for each on the main process; what they found, the same on every process."""
    parts = Parts(config)
    findings = {}
    for name, check in CHECKS.items():
        with _time_limit(CHECK_SECONDS, name, "no end on some process"):
            own = _guarded(check, parts)
            finding = combine(gather_object([own]) if parts.launch else [own])
        if finding is None:
            continue
        findings[name] = finding
        if parts.launch is None and name == "launch" and not is_first_of_machine():
            time.sleep(_FIRST_PROCESS_SPEAKS_SECONDS)  # if the first process fails alike, it speaks and ends all
        if parts.is_main:
            print(_line(name, finding), flush=True)
    if parts.accelerator is not None:
        parts.accelerator.end_training()
    return findings


def _guarded(check: Check, parts: Parts) -> Finding | None:
    """Run a check; whatever goes wrong in it is a failure that is told like the others."""
    try:
        return check(parts)
    except UserError as mistake:
        return Finding("failed", str(mistake))
    except Exception as problem:
        return Finding("failed", f"{type(problem).__name__}: {first_line(problem)}")


def combine(findings: Sequence[Finding | None]) -> Finding | None:
    """One finding from those of all ranks: the worst, each text once, naming the ranks where others differ."""
    by_rank = {rank: finding for rank, finding in enumerate(findings) if finding is not None}
    if not by_rank:
        return None
    worst = max((finding.status for finding in by_rank.values()), key=_SEVERITY.index)
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, finding in by_rank.items():
        if finding.status == worst:
            ranks[finding.text].append(rank)
    if worst == "ok" or (len(ranks) == 1 and len(next(iter(ranks.values()))) == len(by_rank)):
        return Finding(worst, next(iter(ranks)))
    texts = (f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}: {text}" for text, who in ranks.items())
    return Finding(worst, "; ".join(texts))


def _line(name: str, finding: Finding) -> str:
    return f"{finding.status:<8} {name:<11} {finding.text}"


@contextmanager
def _time_limit(seconds: float, name: str, problem: str) -> Iterator[None]:
    """End the process with a `failed` line if the body takes longer: nothing gentler ends a waiting collective."""

    def end() -> None:
        if is_first_of_machine():
            print(_line(name, Finding("failed", f"{problem} (gave up after {seconds:g} s)")), flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine the launch and the settings of a command line (train.py's); 1 if something failed, else 0."""
    findings = examine(parse_config(arguments))
    return int(any(finding.status == "failed" for finding in findings.values()))
