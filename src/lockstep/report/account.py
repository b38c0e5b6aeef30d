"""Where the time of a training went, and how much of the machine it used."""

import time
from statistics import median

import torch
from torch import nn

from lockstep.launch.accelerator import Launch
from lockstep.launch.machine import has_fast_bf16
from lockstep.models.summary import forward_flops

_TRIALS = 5
_LEAST_TOLD = 0.005
_WORDS = {
    "compute_share": "compute",
    "data_share": "data",
    "validation_share": "validation",
    "saving_share": "saving",
    "logging_share": "logging",
    "waiting_share": "waiting for other processes",
}
_TOO_MUCH = {
    "data_share": (0.15, "raise --data.workers, or --data.memory_budget so that the set is kept in memory"),
    "validation_share": (0.4, "raise --train.validate_every_epochs"),
    "saving_share": (0.1, "raise --checkpoint.every_steps or --checkpoint.every_epochs"),
    "logging_share": (0.1, "raise --log.every_steps"),
    "waiting_share": (0.3, "straggler_rank in the log names the slowest; a larger --train.batch_size sends less often"),
}
"""From which share on, and what to change"""


def describe_account(account: dict[str, float], launch: Launch, *, streams: bool) -> str:
    """One line of `account_of`, and what to change where a share is too large; `streams`: images are not in memory."""
    shares = [
        f"{words} {account[key]:.0%}"
        for key, words in _WORDS.items()
        if key == "compute_share" or account[key] >= _LEAST_TOLD
    ]
    line = f"time: {', '.join(shares)}"
    if "peak_share" in account:
        line += f"; computing at {account['peak_share']:.0%} of this machine's {_fast_precision(launch)} peak"
    line += f"; started in {account['started_seconds']:.1f} s"
    advice = {key: text for key, (most, text) in _TOO_MUCH.items() if account[key] > most}
    if not streams:
        advice.pop("data_share", None)
    return "; ".join([line, *advice.values()])


def share_of_peak(model: nn.Module, shape: tuple[int, int, int], images_per_second: float, launch: Launch) -> float:
    """Of the operations that products of matrices reach on all processes' devices, what training makes.

    A step is taken for three forwards, as is usual (PaLM, Chowdhery et al. 2022, appendix B: model FLOPs). `model` is
    the bare network, not sharded, `shape` that of an image, (C, H, W); `images_per_second` are those of all processes
    while they compute.
    """
    needed = 3 * forward_flops(model, shape) * images_per_second
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = types.get(_fast_precision(launch), next(model.parameters()).dtype)
    return needed / (measure_peak(launch.device, dtype) * launch.num_processes)


def _fast_precision(launch: Launch) -> str:
    """The one in force, or fp32 on a CPU without instructions for bf16, whose products are slower than convolutions."""
    on_cpu = launch.device.type == "cpu"
    return "fp32" if on_cpu and not has_fast_bf16(on_cpu) else launch.precision_name


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large product of matrices."""
    size = 1024 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = [_seconds_of_product(matrix) for _ in range(1 + _TRIALS)][1:]
    return float(2 * size**3 / median(seconds))


def _seconds_of_product(matrix: torch.Tensor) -> float:
    _wait_for(matrix)
    begun = time.perf_counter()
    matrix @ matrix
    _wait_for(matrix)
    return time.perf_counter() - begun


def _wait_for(matrix: torch.Tensor) -> None:
    if matrix.device.type != "cpu":
        torch.accelerator.synchronize(matrix.device)
