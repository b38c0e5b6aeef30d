"""How this process was launched and what it runs on: guards, the Accelerator, precision, threads.

The guards exist because a wrong launch does not fail by itself. Measured with accelerate 1.15: `accelerate launch
--cpu --num_processes 2` starts one process; torchrun without a GPU starts two that each believe to be alone; fp16 on a
CPU silently computes in fp32; one process is given one CPU thread however many cores there are.
"""

import contextlib
import ctypes
import gc
import os
import signal
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import distributed

from lockstep.settings.config import Config, RuntimeConfig

_COLLECTIVE_TIMEOUT_SECONDS = 1800
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


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
    is_sharded: bool = False
    """FSDP2 instead of DDP"""
    host_group: Any = None
    """Process group of its own for words between hosts (gloo, also where gradients go by NCCL); None: one process"""

    @property
    def is_main(self) -> bool:
        return self.process_index == 0

    @property
    def precision_name(self) -> str:
        return "fp32" if self.precision == "no" else self.precision

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)

    def as_dict(self, accumulation: int) -> dict[str, Any]:
        """For environment.json."""
        return {
            "device": self.device.type,
            "processes": self.num_processes,
            "accumulation": accumulation,
            "fsdp": self.is_sharded,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }

    def describe(self, batch_size: int, micro_batch_size: int) -> str:
        """One line: device, precision, processes, accumulation."""
        accumulation = batch_size // (micro_batch_size * self.num_processes)
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        processes += " (FSDP2)" if self.is_sharded else ""
        return (
            f"{self.device.type}, {self.precision_name}, {processes}, "
            f"{torch.get_num_threads()} CPU threads each; a step is {batch_size} samples = "
            f"{micro_batch_size} (microbatch) x {self.num_processes} (processes) x {accumulation} (accumulation)"
        )


def build_accelerator(config: RuntimeConfig) -> tuple[Accelerator, Launch]:
    """Start the process group; raises ValueError, naming a launch that works, if this one is not what it seems."""
    _end_with_launcher()
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    precision = _precision(config, on_cpu)
    _refuse_lonely_launch()
    shards = _shards(config, precision)
    accelerator, host_group = _meet(config, precision, on_cpu)
    _require_world_size(accelerator)
    cores = max(1, _cores_of_job() // local_processes())
    torch.set_num_threads(config.threads or cores)
    if on_cpu:
        _keep_freed_memory()
    if config.dtype == "float32" and not on_cpu:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return accelerator, Launch(
        accelerator.device,
        accelerator.num_processes,
        accelerator.process_index,
        accelerator.local_process_index,
        precision,
        cores,
        is_sharded=shards and accelerator.num_processes > 1,
        host_group=host_group,
    )


def _meet(config: RuntimeConfig, precision: str, on_cpu: bool) -> tuple[Accelerator, Any]:
    """Build both process groups, the second one for words between hosts; ValueError if the other processes do not come.

    Without a launcher nobody ends the ones that wait. Measured with torch 2.15: a process whose peer was killed while
    they met notices after one to three times the wait, because it tries again.
    """
    wait = timedelta(seconds=config.rendezvous_seconds)
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[_ddp_options(config), InitProcessGroupKwargs(timeout=wait)],
        )
        if accelerator.num_processes == 1:
            return accelerator, None
        groups: tuple[Any, Any] = distributed.group.WORLD, distributed.new_group(backend="gloo", timeout=wait)
        accelerator.wait_for_everyone()  # NCCL connects in its first collective
    except RuntimeError as silence:
        line = _describe_silence(silence, config)
        if line is None:
            raise
        raise ValueError(line) from silence
    # Later, one process may prepare data for long while the others wait.
    for group in groups:
        group.set_timeout(timedelta(seconds=_COLLECTIVE_TIMEOUT_SECONDS))
    return accelerator, groups[1]


def _describe_silence(silence: RuntimeError, config: RuntimeConfig) -> str | None:
    """One line if processes did not meet; None for an error of another kind."""
    text = str(silence)
    networks = distributed.DistStoreError, distributed.DistNetworkError
    if not isinstance(silence, networks) and "gloo" not in text.lower():
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, world_size, address, port = (os.environ.get(name, "?") for name in names)
    if "EADDRINUSE" in text:
        return f"port {port} is taken (EADDRINUSE), by another run perhaps: launch with another --main_process_port"
    return (
        f"process {rank} of {world_size} did not meet the others at {address}:{port} "
        f"({text.splitlines()[0].rstrip('.')}): one of them may have ended, or need longer than "
        f"--runtime.rendezvous_seconds={config.rendezvous_seconds}"
    )


def _end_with_launcher() -> None:
    """Let Linux send SIGTERM when the launcher dies: it may die of a signal that it does not pass on.

    Before the process group is built, which waits for minutes for a launcher that is gone. Without a launcher the
    parent is a shell, which may leave a training alone (nohup).
    """
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return
    signal_at_death_of_parent(signal.SIGTERM)
    with contextlib.suppress(OSError):
        # It may have died during the imports. In a container it may itself be process 1.
        if os.getppid() == 1 and not Path("/proc/1/comm").read_text().startswith(("python", "accelerate", "torchrun")):
            os.kill(os.getpid(), signal.SIGTERM)


def signal_at_death_of_parent(number: signal.Signals) -> None:
    """Let Linux send this process a signal when the one that started it dies; elsewhere, do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 1 GiB for the next step; elsewhere, do nothing.

    By default it gives large ones back, and Linux fills each page anew with zeros when a step asks for it again.
    Measured on a 2-core AMD EPYC in bf16, batches of 256: cifar10_cnn 1.18 to 1.24 times as fast, simple_cnn 1.02, the
    largest memory in use 3 % more.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if not library.mallopt(_M_MMAP_THRESHOLD, 1 << 30):
            library.mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions take
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def local_processes() -> int:
    """Processes of this run on this machine, among which its cores and its memory are divided."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _cores_of_job() -> int:
    """Cores of this machine for all processes; the word of SLURM or of a container counts where neither binds them."""
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    try:
        quota, period = _CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _ddp_options(config: RuntimeConfig) -> DistributedDataParallelKwargs:
    # torch 2.15 renames broadcast_buffers; accelerate 1.15 and older torch know the old name only.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    hook = DDPCommunicationHookType.BF16 if config.compress_gradients else DDPCommunicationHookType.NO
    return DistributedDataParallelKwargs(
        broadcast_buffers=False,  # running statistics are ours to combine: DDP would overwrite them with rank 0's
        gradient_as_bucket_view=config.bucket_view,
        static_graph=config.static_graph,
        comm_hook=hook,
    )


def _shards(config: RuntimeConfig, precision: str) -> bool:
    """Whether the setting or the launcher asks for FSDP.

    Accelerate must not see it: its own FSDP2 works on accelerators only, and makes a plugin that prepares the network.
    """
    launched = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if (launched or config.fsdp) and precision == "fp16":
        raise ValueError("FSDP cannot train in fp16 (each process would scale its part alone): launch with bf16")
    if (launched or config.fsdp) and config.compile:
        raise ValueError(
            "FSDP does not go with --runtime.compile=true (torch.compile stops at its hooks): leave one out"
        )
    return launched or config.fsdp


def _refuse_lonely_launch() -> None:
    """`accelerate launch --cpu --num_processes N` sets an address to meet at, but starts one process without a rank."""
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise ValueError(
            "the launcher was told of several processes but started one (accelerate launch --cpu does this); use: "
            "accelerate launch --config_file accelerate_configs/cpu_2proc.yaml --num_processes N train.py"
        )


def _require_world_size(accelerator: Accelerator) -> None:
    for variable in ("WORLD_SIZE", "EXPECTED_WORLD_SIZE"):
        wanted = int(os.environ.get(variable, accelerator.num_processes))
        if wanted != accelerator.num_processes:
            raise ValueError(
                f"{variable} says {wanted} processes, but this process is one of {accelerator.num_processes}: each "
                "would train alone. Launch with --multi_gpu or accelerate_configs/cpu_2proc.yaml (CPU)"
            )


def _precision(config: RuntimeConfig, on_cpu: bool) -> str:
    """no, bf16 or fp16: what the setting and the launcher come to; refused where the device would not do it."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = {"launch": launched, "auto": "bf16" if has_fast_bf16(on_cpu) else "no"}.get(
        config.precision, config.precision
    )
    source = f"--runtime.precision={config.precision}" + (f" ({launched})" if config.precision == "launch" else "")
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"{source} is not supported: use no, bf16 or fp16")
    if config.dtype == "float64" and precision != "no":
        raise ValueError(f"{source} cannot be combined with --runtime.dtype=float64: launch with --mixed_precision no")
    if precision == "fp16" and on_cpu:
        raise ValueError(f"{source}: a CPU cannot train in fp16 (Accelerate would silently use fp32): use bf16")
    if precision == "bf16" and not on_cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise ValueError(f"{source}: {torch.cuda.get_device_name()} has no bf16: use fp16")
    return precision


def has_fast_bf16(on_cpu: bool) -> bool:
    """Whether bf16 is worth it here: AMX or AVX512-BF16 on a CPU, native bf16 on a GPU."""
    if not on_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def end_program() -> None:
    """Call when all is done and saved: ignore signals that come too late, wait for what processes still send.

    The exit of the interpreter gives signals their defaults again: a finished job counted as killed by its scheduler's.
    With the process group in place, or kept alive by a reference cycle, some exits were aborted: one of 30 trainings
    of two processes, two of 6 sharded ones.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


class Profiler:
    """With `runtime.profile`, steps 10 to 15 of this start leave a trace in `<run>/profile`; else nothing happens."""

    def __init__(self, config: RuntimeConfig, run_dir: Path, launch: Launch) -> None:
        self._profile = None
        if config.profile and launch.is_main:
            schedule = torch.profiler.schedule(wait=8, warmup=1, active=6, repeat=1)
            write = torch.profiler.tensorboard_trace_handler(str(run_dir / "profile"))
            self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
            self._profile.start()

    def step(self) -> None:
        """Call at the end of every step."""
        if self._profile is not None:
            self._profile.step()


def resolve_micro_batch_size(config: Config, num_processes: int, kept: int | None = None) -> int:
    """The samples of one forward/backward; for auto, the most that it may be.

    Where the setting leaves it open, `kept`, that of an earlier start of the run, counts. Raises ValueError with a
    launch that fits where the numbers do not.
    """
    batch_size, micro_batch_size = config.train.batch_size, config.train.micro_batch_size
    given = micro_batch_size if isinstance(micro_batch_size, int) else kept
    micro = given or batch_size // num_processes
    if micro and batch_size % (micro * num_processes) == 0:
        if config.runtime.static_graph and batch_size > micro * num_processes:  # torch 2.15 fails an assertion
            raise ValueError("--runtime.static_graph=true does not go with accumulation: leave one of them out")
        return micro
    microbatches = batch_size // micro if given else batch_size
    fitting = [str(n) for n in range(1, microbatches + 1) if microbatches % n == 0]
    nearest = sorted(fitting, key=lambda n: abs(int(n) - num_processes))[:2]
    step = (micro or 1) * num_processes
    below = batch_size // step * step
    sizes = " or ".join(str(size) for size in (below, below + step) if size)
    smaller = [size for size in range(1, micro) if batch_size % (size * num_processes) == 0]
    shrink = f", or micro_batch_size to {smaller[-1]} (other batch statistics)" if smaller else ""
    raise ValueError(
        f"--train.batch_size={batch_size} is not a multiple of {micro or 1} (micro_batch_size) x {num_processes} "
        f"(processes): launch {' or '.join(sorted(nearest, key=int))} processes, or set batch_size to {sizes}{shrink}"
    )
