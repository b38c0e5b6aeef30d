"""FSDP2: each process keeps a part of the weights, of their average and of the optimizer's state.

torch's `fully_shard` cuts every parameter along its first dimension (a DTensor), gathers whole weights for a forward
and its backward, and gives each process its part of the averaged gradient. The network is one unit, so that any
network will do; the weights of CNNs are small next to their activations. What has to reach a part goes through
`local`, `whole` and `part_of`, which leave ordinary tensors alone. Checkpoints hold whole tensors: a run may go on
with or without sharding, on any number of processes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lockstep.launch.accelerator import Launch
from lockstep.settings.config import RuntimeConfig


def shard(model: nn.Module, launch: Launch, *, compress_gradients: bool) -> None:
    """Cut the parameters of a network, in place, if the launch asks for it; `compress_gradients` sends them as bf16.

    FSDP2 refuses parameters in another layout than torch's own (torch 2.15), and a layout has kernels of its own: one
    process alone, which cuts nothing, takes it too, so that its bits are those of several.
    """
    if launch.fsdp:
        model.to(memory_format=torch.contiguous_format)
    if not launch.is_sharded:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(launch.device.type, (launch.num_processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compress_gradients else None)
    # A parameter of no dimension cannot be cut: each process keeps it whole.
    whole_ones = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, ignored_params=whole_ones)
    sharded: Any = model
    sharded.set_gradient_divide_factor(1.0)  # gradients are summed: the loss is divided by the global batch already
    sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(what: Tensor | nn.Module) -> bool:
    """Whether `shard` cut this tensor or network. Asked without importing FSDP, which takes half a second."""
    return hasattr(what, "full_tensor") or hasattr(what, "unshard")


class ShardedNetwork(nn.Module):
    """What trains: the counterpart of DDP's wrapper, with its `no_sync`."""

    def __init__(self, model: Any) -> None:
        """`model` is the bare network, cut by `shard`."""
        super().__init__()
        self.module = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the whole network."""
        return self.module(images)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it gradients add up on each process, and the gathered weights stay for the next microbatch."""
        self.module.set_requires_gradient_sync(False)
        self.module.set_reshard_after_backward(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)
            self.module.set_reshard_after_backward(True)

    def reduce_by(self, reduce_scatter: Any) -> None:
        """Sum gradients over processes by a function of torch's interface `ReduceScatter`."""
        self.module.set_custom_reduce_scatter(reduce_scatter)


def prepare(accelerator: Accelerator, launch: Launch, model: nn.Module, config: RuntimeConfig) -> nn.Module:
    """The network that trains: in mixed precision, wrapped by DDP or FSDP2 where there are several processes."""
    # Placed it is; asked to place it, Accelerate would import all of DTensor, 2 s, to see whether it is sharded.
    network = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # that is autocast alone
    if is_sharded(model):
        return ShardedNetwork(network)
    if launch.num_processes == 1:
        return network
    # torch 2.15 renames broadcast_buffers; older torch knows the old name only.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    return DistributedDataParallel(
        network,
        device_ids=None if launch.device.type == "cpu" else [launch.device],
        broadcast_buffers=False,  # running statistics are ours to combine: DDP would overwrite them with rank 0's
        gradient_as_bucket_view=config.bucket_view,
        static_graph=config.static_graph,
    )


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Within it forwards without gradients wait for no other process. Every process must take part."""
    if is_sharded(model):
        model.unshard()
    yield
    if is_sharded(model):
        model.reshard()


def local(tensor: Any) -> Tensor:
    """This process's part, sharing its memory."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """The tensor without its cuts, on every process; every process must take part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_of(values: Tensor, like: Any) -> Tensor:
    """A copy of whole `values`, which every process has, cut and laid out in memory as `like` is.

    The layout matters: the fused kernels of torch 2.15 take a momentum in another one for what it is not.
    """
    if not is_sharded(like):
        return torch.empty_like(like, dtype=values.dtype).copy_(values)
    from torch.distributed.tensor import distribute_tensor

    values = values.to(like.device).contiguous()
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)
