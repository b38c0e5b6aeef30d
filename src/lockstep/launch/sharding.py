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
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lockstep.launch.accelerator import Launch
from lockstep.settings.config import RuntimeConfig


def shard(model: nn.Module, launch: Launch, *, compress_gradients: bool) -> None:
    """Cut the parameters of a network, in place, if the launch asks for it; `compress_gradients` sends them as bf16."""
    if not launch.is_sharded:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(launch.device.type, (launch.num_processes,))
    model.to(memory_format=torch.contiguous_format)  # FSDP2 refuses parameters in another layout (torch 2.15)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compress_gradients else None)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


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
        self._sync(False)
        try:
            yield
        finally:
            self._sync(True)

    def _sync(self, enabled: bool) -> None:
        self.module.set_requires_gradient_sync(enabled)
        self.module.set_reshard_after_backward(enabled)


def prepare(accelerator: Accelerator, launch: Launch, model: nn.Module, config: RuntimeConfig) -> nn.Module:
    """The network that trains: in mixed precision, its gradients averaged over processes by DDP or FSDP2."""
    # Placed it is; asked to place it, Accelerate would import all of DTensor, 2 s, to see whether it is sharded.
    network = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # that is autocast alone
    if is_sharded(model):
        return ShardedNetwork(network)
    if launch.num_processes == 1:
        return network
    # torch 2.15 renames broadcast_buffers; older torch knows the old name only.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    network = DistributedDataParallel(
        network,
        device_ids=None if launch.device.type == "cpu" else [launch.device],
        broadcast_buffers=False,  # running statistics are ours to combine: DDP would overwrite them with rank 0's
        gradient_as_bucket_view=config.bucket_view,
        static_graph=config.static_graph,
    )
    if config.compress_gradients:
        network.register_comm_hook(None, bf16_compress_hook)
    return network


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
