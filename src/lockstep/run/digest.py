"""64 bits over everything that a training has learned: equal digests, equal weights.

Every element, taken as an integer, is multiplied by a number that its tensor's name and its place give, and the
products are summed modulo 2**64. Such a sum has no order, so kernels, layouts and sharding leave no trace, and one
number comes out of any device without a step having to wait for it. One changed element always changes it (its factor
is odd), several do but for one chance in 2**64.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lockstep.launch.sharding import whole
from lockstep.randomness import mix_tensor
from lockstep.training.ema import ExponentialAverage

_BLOCK = 1 << 16
_BLOCKS_AT_A_TIME = 16  # whose int64 copies take 8 MiB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(model: nn.Module, average: ExponentialAverage | None) -> Tensor:
    """The digest of weights, buffers and average: an int64 scalar on their device, for which nobody has waited yet.

    Of a sharded network every process must take part.
    """
    parts: dict[str, Tensor] = dict(model.state_dict())
    if average is not None:
        parts |= {_average_name(name): value for name, value in average.state_dict().items()}
    return digest_of(parts)


def digest_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The digest of tensors by name, wherever and in whatever layout they lie."""
    total: Tensor | None = None
    for size in sorted({tensor.element_size() for tensor in tensors.values()}):
        chosen = {name: tensor for name, tensor in tensors.items() if tensor.element_size() == size}
        names = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in chosen.items())
        bits = torch.cat([whole(tensor).flatten().view(_BITS[size]) for tensor in chosen.values()])
        part = _hash(bits, _seed(names))
        total = part if total is None else total + part
    assert total is not None, "a network without anything to learn"
    return total


def digest_of_checkpoint(folder: Path, model: nn.Module) -> str | None:
    """The digest that metrics.jsonl has for the step of a checkpoint of this network; None where `folder` is none."""
    if not (folder / "model.safetensors").is_file():
        return None
    own, ema = load_file(folder / "model.safetensors"), folder / "ema.safetensors"
    averages = load_file(ema) if ema.is_file() else {}
    parts = {name: own[name] for name in model.state_dict()}  # in the order of the network: files have another
    return as_text(int(digest_of(parts | {_average_name(name): averages[name] for name in parts if averages})))


def _average_name(name: str) -> str:
    return f"average of {name}"


def _hash(bits: Tensor, seed: int) -> Tensor:
    """The sum over a vector's elements, each times a factor for its place in a block and one for the block."""
    inner = _factors(_BLOCK, 0, bits.device)
    full = len(bits) // _BLOCK * _BLOCK
    rows = [(blocks.to(torch.int64) * inner).sum(1) for blocks in bits[:full].view(-1, _BLOCK).split(_BLOCKS_AT_A_TIME)]
    rest = bits[full:].to(torch.int64)
    sums = torch.cat([*rows, (rest * inner[: len(rest)]).sum().view(1)])
    return (sums * _factors(len(sums), seed, bits.device)).sum()


@cache
def _factors(count: int, seed: int, device: torch.device) -> Tensor:
    """Odd numbers, int64 (count,), that follow from the seed."""
    return mix_tensor(torch.arange(count, device=device) + seed) | 1


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def as_text(value: int) -> str:
    """A digest as logs have it: 16 hexadecimal digits."""
    return f"{value & ((1 << 64) - 1):016x}"
