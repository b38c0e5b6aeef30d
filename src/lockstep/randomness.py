"""Randomness without state: every random number is a pure function of what it is for.

A sample's augmentation follows from (seed, epoch, sample index), a microbatch's dropout and mixing from
(seed, step, microbatch). No generator is carried along, so nothing depends on which process or worker draws,
or on how often training was stopped, and a checkpoint has no generator to save.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
It is integer arithmetic modulo 2**64 and so gives the same bits on every device.
"""

import hashlib
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix_seed(*parts: int) -> int:
    """One 64-bit number from several integers; any change in any part gives an unrelated one."""
    state = 0
    for part in parts:
        state = (state + _GOLDEN + (part & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def mix_array(values: np.ndarray) -> np.ndarray:
    """The same finaliser on a uint64 array, element by element."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 values seen as unsigned (torch's own shift keeps the sign)."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix_tensor(values: Tensor) -> Tensor:
    """The same on an int64 tensor, seen as unsigned."""
    values = (values ^ _shift_right(values, 30)) * _signed(_FIRST)
    values = (values ^ _shift_right(values, 27)) * _signed(_SECOND)
    return values ^ _shift_right(values, 31)


def sample_keys(seed: int, epoch: int, samples: Tensor, repeats: Tensor) -> Tensor:
    """One key per sample, int64 (B,), from its index and its repeat within the epoch, both int64 (B,)."""
    keys = mix_tensor(samples + _signed(mix_seed(seed, epoch)))
    return mix_tensor(keys + repeats)


def uniforms(keys: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each key's own stream: `real_type` (B, count) in [0, 1)."""
    steps = torch.arange(1, 1 + count, device=keys.device) * _signed(_GOLDEN)
    real = real_type(keys.device)
    digits = 53 if real == torch.float64 else 24
    return _shift_right(mix_tensor(keys[:, None] + steps), 64 - digits).to(real) * 2.0**-digits


def real_type(device: torch.device) -> torch.dtype:
    """The type of random numbers, and of what is computed from them: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(keys: Tensor, stream: str, count: int) -> Tensor:
    """The first `count` numbers of the stream of that name, of each key (B,): `real_type` (B, count) in [0, 1).

    Streams of different names are unrelated: a name gives the keys another beginning each.
    """
    return uniforms(mix_tensor(keys ^ _stream_seed(stream)), count)


def normals(first: Tensor, second: Tensor) -> Tensor:
    """Standard normal numbers from as many pairs of numbers in [0, 1), by Box and Muller (1958)."""
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)


@cache
def _stream_seed(stream: str) -> int:
    return _signed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big"))


def seed_run(seed: int) -> None:
    """Make the initial weights a function of the seed."""
    _seed_generators(mix_seed(seed) >> 1)


def seed_microbatch(seed: int, step: int, microbatch: int) -> None:
    """Make dropout, drop-path and injected noise of one microbatch a function of (seed, step, microbatch)."""
    _seed_generators(mix_seed(seed, step, microbatch) >> 1)


def _seed_generators(seed: int) -> None:
    """What torch.manual_seed does; without a GPU it would note each time who called, in case one comes (0.2 ms)."""
    torch.manual_seed(seed) if torch.accelerator.is_available() else torch.default_generator.manual_seed(seed)
