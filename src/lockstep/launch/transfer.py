"""From the memory of the host to the device."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, in order with what is queued there; the host does not wait.

    From ordinary memory a copy to a GPU would wait for all that is queued, so it goes by pinned memory, which torch
    keeps for the next one.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def copied(batches: Iterable[Iterable[Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Each of `batches`, whose tensors the host has, on the device, as by `to_device`.

    To a GPU they go on a stream of their own, beside what is computed there, as in timm's PrefetchLoader and apex.
    """
    # Unlike there, no batch is asked for before its turn: the host, which nothing in a step makes wait, asks while the
    # GPU still computes the one before. So an error, a stop and the end come at the step that they belong to.
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        if side is None:
            yield tuple(to_device(part, device) for part in batch)
            continue
        with torch.cuda.stream(side):
            there = tuple(to_device(part, device) for part in batch)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(side)
        for part in there:
            part.record_stream(computing)  # whose work with it ends before its memory takes a later copy
        yield there
