"""The one order of sums: a tree that does not show who computed what."""

import itertools
from math import ceil, log2
from typing import Any

import pytest

from lockstep.data.sampler import block_of
from lockstep.training.tree import Subtrees, nodes_of, tree_sum

LEAVES = [1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 31, 32, 33, 64, 100]


def join(left: str, right: str) -> str:
    return f"({left} {right})"


def tree_of(leaves: int, processes: int) -> str:
    """The order in which so many processes sum, spelt out."""
    whole: Subtrees[str] = Subtrees(leaves, join)
    for process in range(processes):
        own: Subtrees[str] = Subtrees(leaves, join)
        for number in block_of(process, processes, leaves):
            own.push((0, number), str(number))
        for node, text in own.pop():
            whole.push(node, text)
    ((_, text),) = whole.pop()
    return text


def test_small_trees_spelt_out() -> None:
    assert tree_of(1, 1) == "0"
    assert tree_of(4, 1) == "((0 1) (2 3))"
    assert tree_of(5, 1) == "(((0 1) (2 3)) 4)"
    assert tree_of(7, 1) == "(((0 1) (2 3)) ((4 5) 6))"


@pytest.mark.parametrize("leaves", LEAVES)
def test_any_number_of_processes_sums_in_the_same_order(leaves: int) -> None:
    alone = tree_of(leaves, 1)
    assert all(tree_of(leaves, processes) == alone for processes in range(1, leaves + 1))
    assert alone.count("(") == leaves - 1  # every microbatch once


@pytest.mark.parametrize("leaves", LEAVES)
def test_few_sums_are_kept_and_sent(leaves: int) -> None:
    """A block has at most two subtrees of a size; a process that adds up from the left keeps one of a size."""
    own: Subtrees[None] = Subtrees(leaves, lambda left, right: None)
    for number in range(leaves):
        own.push((0, number), None)
        assert len(own.sums) <= ceil(log2(leaves)) + 1
    for processes in range(1, leaves + 1):
        blocks = [block_of(process, processes, leaves) for process in range(processes)]
        assert list(itertools.chain(*blocks)) == list(range(leaves))
        assert all(len(nodes_of(block, leaves)) <= max(1, 2 * ceil(log2(len(block) + 1))) for block in blocks)
        if leaves % processes == 0 and (leaves // processes).bit_count() == 1:
            assert all(len(nodes_of(block, leaves)) == 1 for block in blocks)


def test_nodes_name_the_microbatches_below_them() -> None:
    for leaves, processes in ((13, 4), (8, 3), (100, 7)):
        for process in range(processes):
            block = block_of(process, processes, leaves)
            below = [
                range(index << level, min((index + 1) << level, leaves)) for level, index in nodes_of(block, leaves)
            ]
            assert list(itertools.chain(*below)) == list(block)


def test_tree_sum_is_that_sum() -> None:
    assert tree_sum([]) == 0.0
    values = [1.0, 1e-16, 1e-16, 1e-16, 3.0, 1e-16, 1e16]
    a, b, c, d, e, f, g = values
    assert tree_sum(values) == ((a + b) + (c + d)) + ((e + f) + g)
    assert tree_sum(values) != sum(values), "rounding must be able to tell orders apart here"


def test_pop_empties() -> None:
    subtrees: Subtrees[Any] = Subtrees(4, join)
    subtrees.push((0, 0), "0")
    assert subtrees.pop() == [((0, 0), "0")] and subtrees.pop() == []
