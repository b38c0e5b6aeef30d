"""The one order of sums: a binary tree over the microbatches of a step, whoever computes them.

Adding floating-point numbers in another order gives other last digits, and training amplifies them (docs/sameness.md).
So what microbatches contribute is summed in one order: microbatch 0 with 1, 2 with 3, then these sums with each other,
and so on; where a right half is empty, the left one is the sum. A process computes a contiguous block of microbatches.
It adds up the complete subtrees of its block as they come, like a binary counter, and processes exchange the sums of
these subtrees: each finishes the tree for its share of every vector (all-to-all), and all gather the results. A block
of a power of two makes one subtree; then this is as many bytes as a ring all-reduce sends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.data.sampler import block_of
from lockstep.launch.accelerator import Launch

Node = tuple[int, int]
"""Level and index of a subtree: microbatches index * 2**level to (index + 1) * 2**level, as far as there are any"""

Value = TypeVar("Value")


class Subtrees(Generic[Value]):
    """Sums over complete subtrees, which merge as soon as both halves of a larger one are there."""

    def __init__(self, leaves: int, add: Callable[[Value, Value], Value]) -> None:
        """`leaves` is the number of microbatches of a step."""
        self.leaves, self._add = leaves, add
        self.sums: list[tuple[Node, Value]] = []

    def push(self, node: Node, value: Value) -> None:
        """Add the next subtree to the right; a leaf is (0, number of the microbatch)."""
        level, index = node
        while not (index == 0 and 1 << level >= self.leaves):
            if index % 2 and self.sums and self.sums[-1][0] == (level, index - 1):
                value = self._add(self.sums.pop()[1], value)
            elif index % 2 or (index + 1) << level < self.leaves:
                break  # its sibling is another process's, or still to come
            level, index = level + 1, index // 2
        self.sums.append(((level, index), value))

    def pop(self) -> list[tuple[Node, Value]]:
        """All sums, from left to right; then there are none."""
        sums, self.sums = self.sums, []
        return sums


def nodes_of(block: range, leaves: int) -> list[Node]:
    """The subtrees that a block of microbatches comes to."""
    subtrees: Subtrees[None] = Subtrees(leaves, lambda left, right: None)
    for number in block:
        subtrees.push((0, number), None)
    return [node for node, _ in subtrees.sums]


def tree_sum(values: Sequence[float]) -> float:
    """The sum of one number per microbatch; 0 of none."""
    subtrees: Subtrees[float] = Subtrees(len(values), lambda left, right: left + right)
    for number, value in enumerate(values):
        subtrees.push((0, number), value)
    return subtrees.pop()[0][1] if values else 0.0


def add_to_right(left: Tensor, right: Tensor) -> Tensor:
    """left + right, in the place of the right one: the bits do not depend on which comes first."""
    return right.add_(left)


# ---- between processes


@dataclass
class Transfer:
    """A vector on its way: the pieces that this process gets, and what will be the sum."""

    length: int
    pieces: Tensor
    work: Any
    total: Tensor
    sent: Tensor
    """Kept until it has been sent"""


class TreeExchange:
    """Completes the tree over all processes, for vectors of which each process has the sums of its subtrees."""

    def __init__(self, leaves: int, launch: Launch) -> None:
        self._leaves, self._processes = leaves, launch.num_processes
        self._nodes = [nodes_of(block_of(p, self._processes, leaves), leaves) for p in range(self._processes)]
        self._own = self._nodes[launch.process_index]

    def total(self, sums: Sequence[tuple[Node, Tensor]]) -> Tensor:
        """The sum over all microbatches of vectors (n,), given those of this process's subtrees; waits for all."""
        if self._processes == 1:
            ((_, whole),) = sums
            return whole
        transfer = self.start([piece for _, piece in sums])
        return self.finish(transfer, self.add_up(transfer))

    def start(self, pieces: Sequence[Tensor]) -> Transfer:
        """Send to every process its share of this process's pieces (n,), in the background."""
        assert len(pieces) == len(self._own), (len(pieces), self._own)
        length, processes = len(pieces[0]), self._processes
        share = -(-length // processes)
        if len(pieces) == 1 and length == share * processes:
            sent = pieces[0]
        else:
            padded = pieces[0].new_zeros(len(pieces), share * processes)
            torch._foreach_copy_(list(padded[:, :length]), list(pieces))
            sent = padded.view(len(pieces), processes, share).transpose(0, 1).contiguous().view(-1)
        counts = [len(nodes) for nodes in self._nodes]
        received = sent.new_empty(sum(counts) * share)
        splits = [count * share for count in counts], [len(pieces) * share] * processes
        work = dist.all_to_all_single(received, sent, *splits, async_op=True)
        return Transfer(length, received.view(-1, share), work, sent.new_empty(processes * share), sent)

    def add_up(self, transfer: Transfer) -> Any:
        """Finish the tree for this process's share, and send it to all, in the background."""
        transfer.work.wait()
        subtrees: Subtrees[Tensor] = Subtrees(self._leaves, add_to_right)
        rows = iter(transfer.pieces)
        for nodes in self._nodes:
            for node in nodes:
                subtrees.push(node, next(rows))
        ((_, share),) = subtrees.pop()
        return dist.all_gather_into_tensor(transfer.total, share, async_op=True)

    def finish(self, transfer: Transfer, gathering: Any) -> Tensor:
        """The sum (n,), when all have sent their shares."""
        gathering.wait()
        return transfer.total[: transfer.length]
