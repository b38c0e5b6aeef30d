"""Memory: the largest microbatch that fits, tried before training, and what to say when there is not enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator

from lockstep.data.images import Data
from lockstep.errors import UserError
from lockstep.launch.accelerator import Launch
from lockstep.launch.machine import local_processes
from lockstep.settings.config import Config
from lockstep.training.learner import blank_batch, build_learner

# Left free while trying: for fragments, communication buffers and evaluation.
_SPARE_SHARE = 0.1
_PROBE_SAMPLES = 8


def find_micro_batch_size(config: Config, data: Data, accelerator: Accelerator, launch: Launch) -> int:
    """The largest microbatch whose step fits into the memory of every process. Every process must take part.

    Raises UserError if not even one sample fits.
    """
    share = config.train.batch_size // launch.num_processes
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    fitting = next((size for size in sizes if _fits(size, config, data, accelerator, launch)), 0)
    found = torch.tensor(fitting, device=accelerator.device)
    if launch.num_processes > 1:
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    if not found:
        raise UserError(f"not even a microbatch of one sample fits into the memory of {launch.device.type}")
    launch.say(f"--train.micro_batch_size=auto: {int(found)} is the largest that fits")
    return int(found)


def _fits(size: int, config: Config, data: Data, accelerator: Accelerator, launch: Launch) -> bool:
    """Whether a step of `size` samples can be done on this device."""
    if accelerator.device.type == "cpu":
        needed = size * _bytes_per_sample(config, data, accelerator, launch)
        return needed < (1 - _SPARE_SHARE) * psutil.virtual_memory().available / local_processes()
    try:
        _try_step(size, config, data, accelerator, launch)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.accelerator.empty_cache()
    return True


def _try_step(size: int, config: Config, data: Data, accelerator: Accelerator, launch: Launch) -> None:
    """A step on throw-away parts, with everything that training keeps in memory."""
    device = accelerator.device
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        spare = torch.empty(int(_SPARE_SHARE * total), dtype=torch.uint8, device=device)  # noqa: F841
    learner = build_learner(config, data, accelerator, launch.alone(), resumes=True)
    try:
        learner.rehearse(blank_batch(data, size, device))
        learner.optimizer.step()
    finally:
        accelerator.free_memory()  # it keeps what it has prepared


def _bytes_per_sample(config: Config, data: Data, accelerator: Accelerator, launch: Launch) -> int:
    """What a sample of a microbatch needs, from what the forward of a few of them keeps for its backward.

    Trying would not do on a CPU: Linux promises memory that it does not have, and kills whoever uses it.
    """
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _try_step(_PROBE_SAMPLES, config, data, accelerator, launch)
    # As much again for the gradients that flow back and the buffers of the kernels.
    return 2 * sum(kept.values()) // _PROBE_SAMPLES


@contextmanager
def out_of_memory_explained(config: Config) -> Iterator[None]:
    """Within it, running out of memory is a UserError that names the setting to lower."""
    try:
        yield
    except RuntimeError as error:
        # On a CPU it is a RuntimeError like any other.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory: lower --train.micro_batch_size={config.train.micro_batch_size} to a divisor of it; "
            f"--train.batch_size={config.train.batch_size} can stay, by accumulation"
        ) from error
