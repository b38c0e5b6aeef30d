"""Launches that are not what they seem, refused before anything is built.

A wrong launch does not fail by itself. Measured with accelerate 1.15: `accelerate launch --cpu --num_processes 2`
starts one process; torchrun without a GPU starts two that each believe to be alone; fp16 on a CPU silently computes in
fp32.
"""

import os

import torch
from accelerate import Accelerator

from lockstep.errors import UserError
from lockstep.launch.machine import has_fast_bf16
from lockstep.settings.config import RuntimeConfig

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_COUNTS = (*_RANKS, "LOCAL_WORLD_SIZE", "EXPECTED_WORLD_SIZE")


def refuse_odd_ranks() -> None:
    """Variables of a launcher that are set by hand, or half of them: raises UserError that names the one at fault."""
    given = {name: os.environ[name] for name in _COUNTS if name in os.environ}
    for name, value in given.items():
        if not value.isascii() or not value.isdigit() or len(value) > 9:
            raise UserError(f"{name}={value!r} in the environment must be a whole number: unset it, or use a launcher")
    if not int(given.get("LOCAL_WORLD_SIZE", 1)):
        raise UserError("LOCAL_WORLD_SIZE=0 in the environment must be at least 1: unset it, or use a launcher")
    rank, processes, port = (int(given.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if processes <= 1 and "LOCAL_RANK" not in given and rank == 0:
        return
    missing = [name for name in (*_RANKS, "MASTER_ADDR") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(name for name in _RANKS if name in given)} in the environment, but no {missing[0]}: unset "
            "them, or start with accelerate launch"
        )
    if rank >= processes or not 0 < port < 65536:
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={processes} and MASTER_PORT={port} do not go together: use a launcher"
        )


def refuse_other_loops() -> None:
    """Variables by which Accelerate would change the training behind the settings' back; raises UserError."""
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accumulation} in the environment would divide every gradient: "
            "unset it; accumulation follows from --train.batch_size and --train.micro_batch_size"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("no", ""):
        raise UserError(
            f"dynamo_backend is {compiler}: launch with --dynamo_backend no, and set --runtime.compile=default"
        )


def refuse_lonely_launch() -> None:
    """`accelerate launch --cpu --num_processes N` sets an address to connect to, but starts one process without a rank.

    Raises UserError.
    """
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise UserError(
            "the launcher was told of several processes but started one (accelerate launch --cpu does this); use: "
            "accelerate launch --config_file accelerate_configs/cpu_2proc.yaml --num_processes N train.py"
        )


def require_world_size(accelerator: Accelerator) -> None:
    """Raise UserError if the launcher started more processes than Accelerate knows of."""
    for variable in ("WORLD_SIZE", "EXPECTED_WORLD_SIZE"):
        wanted = int(os.environ.get(variable, accelerator.num_processes))
        if wanted != accelerator.num_processes:
            raise UserError(
                f"{variable} says {wanted} processes, but this process is one of {accelerator.num_processes}: each "
                "would train alone. Launch with --multi_gpu or accelerate_configs/cpu_2proc.yaml (CPU)"
            )


def resolve_precision(config: RuntimeConfig, on_cpu: bool) -> str:
    """no, bf16 or fp16: what the setting and the launcher come to; UserError where the device would not do it."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    meanings = {"launch": launched, "auto": "bf16" if has_fast_bf16(on_cpu) and not config.portable else "no"}
    precision = meanings.get(config.precision, config.precision)
    source = f"--runtime.precision={config.precision}" + (f" ({launched})" if config.precision == "launch" else "")
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"{source} is not supported: use no, bf16 or fp16")
    if config.dtype == "float64" and precision != "no":
        raise UserError(f"{source} cannot be combined with --runtime.dtype=float64: launch with --mixed_precision no")
    if config.portable and precision != "no":
        raise UserError(f"{source} cannot be combined with --runtime.portable=true: launch with --mixed_precision no")
    if precision == "fp16" and on_cpu:
        raise UserError(f"{source}: a CPU cannot train in fp16 (Accelerate would silently use fp32): use bf16")
    if precision == "bf16" and not on_cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise UserError(f"{source}: {torch.cuda.get_device_name()} has no bf16: use fp16")
    return precision


def quicker_precision(config: RuntimeConfig, precision: str, on_cpu: bool) -> str | None:
    """What to set where another precision than the one in force is quicker here, unless it was ruled out.

    Without instructions for bf16, on an EPYC with AVX2, cifar10_cnn took 13 times as long as in fp32.
    """
    is_fast = has_fast_bf16(on_cpu)
    if precision == "bf16" and on_cpu and not is_fast:
        return "this CPU has no instructions for bf16, and is several times as fast in fp32: set --runtime.precision=no"
    may_change = config.precision == "launch" and config.dtype == "float32" and not config.portable
    if precision == "no" and is_fast and may_change:
        return "this device has fast bf16: --runtime.precision=auto takes it"
    return None


def resolve_sharding(config: RuntimeConfig, precision: str) -> bool:
    """Whether the setting or the launcher asks for FSDP; UserError where it does not go with other settings.

    Accelerate must not see it: its own FSDP2 works on accelerators only, and makes a plugin that prepares the network.
    """
    launched = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if (launched or config.fsdp) and precision == "fp16":
        raise UserError("FSDP cannot train in fp16 (each process would scale its part alone): launch with bf16")
    if (launched or config.fsdp) and config.compile != "off":
        raise UserError(
            f"FSDP does not go with --runtime.compile={config.compile} (which stops at its hooks): leave one out"
        )
    return launched or config.fsdp
