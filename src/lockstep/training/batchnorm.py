"""Batch-norm running statistics that move once per step, from the mean over all microbatches of all processes.

PyTorch moves them once per forward, from what this process saw: they then depend on accumulation and on the number
of processes, and DDP hands everyone rank 0's. Here a forward only leaves its batch's statistics in the buffers
(momentum 1); `collect` adds them up in the one order of sums, `commit` averages over the global batch and moves the
real ones once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lockstep.errors import UserError
from lockstep.launch.accelerator import Launch
from lockstep.models.freeze import is_frozen
from lockstep.training.tree import Subtrees, TreeExchange, add_to_right


@contextmanager
def single_values_explained() -> Iterator[None]:
    """Within it, a batch norm that has one value a channel, whose variance is nothing, is a UserError."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise UserError(
            "a batch norm sees one value a channel, because the microbatch has one image and the layer's maps have one "
            "pixel. Raise --train.micro_batch_size, or take larger images or another --model.name"
        ) from error


class RunningStatistics:
    """Owner of the running means and variances of a network while it trains.

    Between steps the buffers of the network hold the real statistics, so evaluation and checkpoints need no care.
    A layer used twice in one forward counts with its last use.
    """

    def __init__(self, model: nn.Module, leaves: int, launch: Launch) -> None:
        """`model` is the bare network; its batch norm gets momentum 1. A step has `leaves` microbatches."""
        self._leaves, self._exchange = leaves, TreeExchange(leaves, launch)
        self._sums: Subtrees[Tensor] = Subtrees(leaves, add_to_right)
        self._buffers: list[Tensor] = []
        self._counters: list[Tensor] = []
        momenta: list[Tensor] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, _BatchNorm) or not layer.track_running_stats or is_frozen(layer):
                continue
            if layer.momentum is None:
                raise UserError(f"batch norm {name} averages over all steps (momentum None): give it a momentum")
            assert layer.running_mean is not None and layer.running_var is not None
            self._buffers += [layer.running_mean, layer.running_var]
            momenta += [torch.full_like(buffer, layer.momentum) for buffer in self._buffers[-2:]]
            if layer.num_batches_tracked is not None:
                self._counters.append(layer.num_batches_tracked)
            layer.momentum = 1.0
        if self._buffers:
            self._momenta = torch.cat(momenta)
            self.reload()

    def reload(self) -> None:
        """Take what the buffers hold now, for example after loading a checkpoint, as the real statistics."""
        self._real = torch.cat(self._buffers)
        self._parts = self._real.split([buffer.numel() for buffer in self._buffers])
        self._sums.pop()
        self._counts = [counter.clone() for counter in self._counters]

    def collect(self, number: int) -> None:
        """Call after each forward in training mode with the number of its microbatch."""
        if self._buffers:
            self._sums.push((0, number), torch.cat(self._buffers))

    @torch.no_grad()
    def commit(self, bad: Tensor) -> None:
        """Call once per step on every process: move the real statistics and put them into the network.

        They stay where they are in a bad step, whose activations are not finite; `bad` is a flag on the device.
        """
        if not self._buffers:
            return
        mean = self._exchange.total(self._sums.pop()) / self._leaves
        self._real.lerp_(torch.where(bad, self._real, mean), self._momenta)
        torch._foreach_copy_(self._buffers, self._parts)
        if self._counters:
            torch._foreach_add_(self._counts, 1)
            torch._foreach_copy_(self._counters, self._counts)
