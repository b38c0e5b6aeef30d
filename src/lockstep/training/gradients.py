"""The gradients of a step, summed over microbatches and processes in the one order of tree.py.

Where DDP is at work, its buckets are exchanged in a communication hook, while the backward pass goes on.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lockstep.data.sampler import block_of
from lockstep.errors import UserError
from lockstep.launch.accelerator import Launch
from lockstep.launch.numerics import sums_in_order
from lockstep.launch.sharding import ShardedNetwork, is_sharded
from lockstep.settings.config import RuntimeConfig
from lockstep.training.pace import Pace
from lockstep.training.tree import Subtrees, Transfer, TreeExchange, add_to_right

Gradient = Tensor | None
"""None for a parameter that had no part in the loss"""


def _add_gradients(left: list[Gradient], right: list[Gradient]) -> list[Gradient]:
    """Adds the left ones to the right ones, in place: the bits of left + right."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if pairs:
        torch._foreach_add_([b for _, b in pairs], [a for a, _ in pairs])
    if len(pairs) < len(right):
        right[:] = [b if b is not None else a for a, b in zip(left, right, strict=True)]
    return right


class Gradients:
    """Sums the gradients of a step's microbatches over all processes, and leaves the sums in the parameters.

    In the one order if `exact`, else in the order that autograd and the process group choose.
    """

    def __init__(self, network: nn.Module, numbers: range, leaves: int, launch: Launch, config: RuntimeConfig) -> None:
        """`network` is the one that trains, `numbers` are those of this process's microbatches out of all `leaves`.

        Raises UserError where FSDP cannot keep the order.
        """
        self._network = cast(Any, network)
        self._numbers, self._leaves = numbers, leaves
        self._in_order = sums_in_order(config)
        self._by_ddp = isinstance(network, DistributedDataParallel)
        self._by_fsdp = isinstance(network, ShardedNetwork)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # Sharded gradients go their own way; what FSDP leaves whole does not.
        self._parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
        self._sums: Subtrees[list[Gradient]] = Subtrees(leaves, _add_gradients)
        self._exchange = TreeExchange(leaves, launch)
        self.pace = Pace(launch.device)
        if self._by_ddp and self._in_order:
            buckets = _Buckets(self._sums, self._parameters, numbers[-1], self._exchange, self.pace)
            self._network.register_comm_hook(None, buckets.exchange)
        elif self._by_ddp:
            self._network.register_comm_hook(self.pace, _sum_as_bf16 if config.compress_gradients else _sum)
        elif self._by_fsdp and self._in_order:
            if leaves % launch.num_processes:
                raise UserError(
                    f"FSDP with --runtime.exact=true needs as many microbatches on every process: {leaves} do not "
                    f"divide by {launch.num_processes}; launch another number, or set --runtime.exact=false"
                )
            self._network.reduce_by(_ReduceScatter(leaves, launch))

    @contextmanager
    def microbatch(self, number: int) -> Iterator[None]:
        """Within it the forward and backward of a microbatch; that of the process's last one completes the sums."""
        is_last = number == self._numbers[-1]
        # Sharded gradients in order are exchanged after every microbatch: nobody holds them whole.
        waits = not is_last and (self._by_ddp or (self._by_fsdp and not self._in_order))
        with self._network.no_sync() if waits else nullcontext():
            yield
        if self._by_ddp and is_last:
            self.pace.exchanged()
        if self._by_ddp and (is_last or not self._in_order):
            return  # the communication hook has put the sums into the parameters, or autograd adds up
        if self._leaves > 1 and self._parameters and (self._in_order or self._by_fsdp):
            self._keep_sums(number, completes=is_last)

    def _keep_sums(self, number: int, *, completes: bool) -> None:
        """Take a microbatch's gradients out of the parameters; the last one puts the sums over all into them."""
        self._sums.push((0, number), [parameter.grad for parameter in self._parameters])
        sums: list[Gradient] = [None] * len(self._parameters)  # autograd's own sum would be a sequence
        if completes:
            sums = self._exchanged() if self._by_fsdp else self._sums.pop()[0][1]
        for parameter, gradient in zip(self._parameters, sums, strict=True):
            parameter.grad = gradient

    def _exchanged(self) -> list[Gradient]:
        """The sums over all processes, of parameters that each of them has whole beside its part of others."""
        zeros = self._parameters[0].new_zeros(sum(parameter.numel() for parameter in self._parameters))
        vectors = [
            (node, _laid_out(gradients, self._parameters, zeros.clone())) for node, gradients in self._sums.pop()
        ]
        return list(_views(self._exchange.total(vectors), self._parameters))


@dataclass
class _Bucket:
    buffer: Tensor
    future: torch.futures.Future[Tensor]
    transfer: Transfer
    gathering: Any = None


class _Buckets:
    """The communication hook of DDP: each bucket is exchanged while the backward pass computes the next one."""

    def __init__(
        self,
        sums: Subtrees[list[Gradient]],
        parameters: Sequence[Tensor],
        last: int,
        exchange: TreeExchange,
        pace: Pace,
    ) -> None:
        """`sums` are those of the microbatches before the `last` one of this process."""
        self._sums, self._last, self._exchange, self._pace = sums, last, exchange, pace
        self._places = {parameter: place for place, parameter in enumerate(parameters)}
        self._stream = torch.cuda.Stream() if parameters[0].is_cuda else None
        self._flying: list[_Bucket] = []

    def exchange(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Send a bucket's sums, and bring the one before it a step further; with the last one, wait for all.

        Every process does this in the order of the buckets, so that their messages meet.
        """
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
        self._flying.append(_Bucket(buffer, future, self._exchange.start(self._pieces(bucket))))
        if bucket.is_last():
            self._pace.ready()
        with self._beside(), nullcontext() if bucket.is_last() else self._pace.blocked():
            for flying in self._flying[-2:] if bucket.is_last() else self._flying[-2:-1]:
                flying.gathering = flying.gathering or self._exchange.add_up(flying.transfer)
            if bucket.is_last():
                for flying in self._flying:
                    flying.buffer.copy_(self._exchange.finish(flying.transfer, flying.gathering))
                    flying.future.set_result(flying.buffer)
                self._flying.clear()
                self._sums.pop()
        return future

    def _beside(self) -> AbstractContextManager[Any]:
        """On a GPU, a stream of its own, so that no kernel of the backward pass waits for messages."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _pieces(self, bucket: dist.GradBucket) -> list[Tensor]:
        """The sums of this process's subtrees for the parameters of a bucket, each in the bucket's layout (n,)."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        newest: list[Gradient] = list(_views(buffer, parameters))
        places = [self._places[parameter] for parameter in parameters]
        subtrees: Subtrees[list[Gradient]] = Subtrees(self._sums.leaves, _add_gradients)
        subtrees.sums = [(node, [gradients[place] for place in places]) for node, gradients in self._sums.sums]
        subtrees.push((0, self._last), newest)
        return [
            buffer if gradients is newest else _laid_out(gradients, parameters, torch.zeros_like(buffer))
            for _, gradients in subtrees.pop()
        ]


def _views(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a bucket's vector, each with the strides of its parameter (GradBucket.gradients has others)."""
    views, start = [], vector.storage_offset()
    for parameter in parameters:
        views.append(vector.as_strided(parameter.shape, parameter.stride(), start))
        start += parameter.numel()
    return views


def _laid_out(gradients: list[Gradient], parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """`vector` with the gradients copied to their places."""
    pairs = [
        (view, gradient)
        for view, gradient in zip(_views(vector, parameters), gradients, strict=True)
        if gradient is not None
    ]
    torch._foreach_copy_([view for view, _ in pairs], [gradient for _, gradient in pairs])
    return vector


class _ReduceScatter:
    """Sums sharded gradients in the one order: torch's interface `ReduceScatter`, for a backward of each microbatch.

    A process gets its part of every microbatch's gradient, and gives the sum after the last one, zeros before. That is
    as many times the bytes as a process has microbatches.
    """

    def __init__(self, leaves: int, launch: Launch) -> None:
        self._leaves = leaves
        self._blocks = [block_of(process, launch.num_processes, leaves) for process in range(launch.num_processes)]
        self._subtrees: list[Subtrees[Tensor]] = [Subtrees(leaves, add_to_right) for _ in self._blocks]
        self._turn = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a message."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Exchange parts (processes * n,) of one microbatch's gradient each; `output_tensor` is (n,)."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        for part, block, subtrees in zip(received.chunk(len(self._blocks)), self._blocks, self._subtrees, strict=True):
            subtrees.push((0, block[self._turn]), part)
        self._turn = (self._turn + 1) % len(self._blocks[0])
        if self._turn:
            output_tensor.zero_()
            return
        whole: Subtrees[Tensor] = Subtrees(self._leaves, add_to_right)
        for subtrees in self._subtrees:
            for node, value in subtrees.pop():
                whole.push(node, value)
        ((_, total),) = whole.pop()
        output_tensor.copy_(total)


def _sum(pace: Pace, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook: the sum in the order that the process group chooses."""
    if bucket.is_last():
        pace.ready()
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _sum_as_bf16(pace: Pace, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook: the same from numbers of half as many bytes."""
    if bucket.is_last():
        pace.ready()
    buffer = bucket.buffer()
    work = dist.all_reduce(buffer.to(torch.bfloat16), async_op=True)
    return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))
