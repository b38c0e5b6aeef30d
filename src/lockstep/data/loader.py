"""Microbatches for training and batches for evaluation, as uint8 images on the device.

A decoded set is indexed directly: no workers, no copies of what is not used. A streamed one is read by a torch
DataLoader whose batches are given by the sampler, so that workers only decide when something is decoded, never what.
"""

import math
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lockstep.augment.geometry import crop_draws
from lockstep.data.images import SKIPPED_LABEL, ImageSet
from lockstep.data.sampler import Microbatch, Sampler, block_of
from lockstep.errors import UserError
from lockstep.launch.accelerator import Launch
from lockstep.launch.copies import leave_signals_to
from lockstep.launch.machine import local_processes, shared_memory_free
from lockstep.launch.transfer import copied, to_device
from lockstep.randomness import sample_keys
from lockstep.settings.config import AugmentConfig, Config, DataConfig

# Samples of one evaluation batch. Fixed, and batches are dealt to processes whole, so that each sample is computed
# in the same company everywhere.
EVALUATION_BATCH = 256


class Batch(NamedTuple):
    """Images uint8 (B, H, W, C), labels int64 (B,) and keys of randomness int64 (B,), all on the device."""

    images: Tensor
    labels: Tensor
    keys: Tensor


def crops_while_decoding(data: ImageSet, augment: AugmentConfig) -> bool:
    """Whether random resized crops are cut where images are decoded: of a streamed set, whose images are large."""
    return data.images is None and augment.resized_crop > 0


Rearrange = Callable[[Tensor, Tensor], Tensor]
"""Of uint8 images (B, H, W, C), by their keys, to as many of the same type"""

_BLOCK_BYTES, _BLOCK_MICROBATCHES = 8 << 20, 16
"""Of decoded images that are brought at a time: small microbatches come several together. What is done to each then
takes less than half as long, as memory and code are still at hand (256 images of 32x32: 1.5 -> 0.6 ms by eights)."""


def _as_they_are(images: Tensor, keys: Tensor) -> Tensor:
    return images


class TrainLoader:
    """This process's share of the global order. Holds no position: any step can be asked for at any time."""

    def __init__(self, data: ImageSet, sampler: Sampler, launch: Launch, config: Config) -> None:
        self.sampler = sampler
        self.numbers = block_of(launch.process_index, launch.num_processes, sampler.microbatches_per_step)
        """Numbers of this process's microbatches within each step"""
        self._data, self._launch, self._config = data, launch, config
        self._labels = data.labels.to(launch.device)
        self._rows = data.rows.to(launch.device)
        self._images = None if data.images is None else data.images.to(launch.device)
        self._precrops = crops_while_decoding(data, config.augment)

    @property
    def accumulation(self) -> int:
        return len(self.numbers)

    def batches(self, steps: range, rearrange: Rearrange = _as_they_are) -> Iterator[Batch]:
        """`accumulation` batches for each step, in the order of `numbers`, with what `rearrange` makes of images."""
        microbatches = self.sampler.microbatches(steps, self.numbers)
        in_memory = self._images is not None
        blocks = map(self._gather, self._blocks(microbatches)) if in_memory else self._stream(microbatches)
        for images, labels, keys in blocks:
            parts = (rearrange(images, keys), labels, keys)
            yield from map(Batch, *(part.split(self.sampler.micro_batch_size) for part in parts))

    def _blocks(self, microbatches: Iterator[Microbatch]) -> Iterator[list[Microbatch]]:
        """Of one epoch each."""
        most = _BLOCK_BYTES // (self.sampler.micro_batch_size * math.prod(self._data.shape))
        for _, epoch in groupby(microbatches, attrgetter("epoch")):
            while block := list(islice(epoch, min(max(most, 1), _BLOCK_MICROBATCHES))):
                yield block

    def _gather(self, block: list[Microbatch]) -> Batch:
        assert self._images is not None
        parts = [np.concatenate([getattr(microbatch, name) for microbatch in block]) for name in ("samples", "repeats")]
        samples, repeats = to_device(torch.from_numpy(np.stack(parts)), self._launch.device)
        rows = self._rows[samples]
        keys = sample_keys(self._config.run.seed, block[0].epoch, rows, repeats)
        return Batch(self._images.take(rows), self._labels[samples], keys)

    def _keys(self, microbatch: Microbatch) -> Tensor:
        """On the host, for the workers that decode."""
        rows = self._data.rows[torch.from_numpy(microbatch.samples)]
        return sample_keys(self._config.run.seed, microbatch.epoch, rows, torch.from_numpy(microbatch.repeats))

    def _stream(self, microbatches: Iterator[Microbatch]) -> Iterator[Batch]:
        min_area = self._config.augment.resized_crop if self._precrops else 0.0
        requests = (Request(m.samples.tolist(), self._keys(m).tolist(), min_area) for m in microbatches)
        batches = _data_loader(self._data, requests, self._workers(), self._launch)
        yield from map(Batch._make, copied(batches, self._launch.device))

    def _workers(self) -> int:
        batch_bytes = self.sampler.micro_batch_size * math.prod(self._data.shape)
        workers, wanted = (choose_workers(self._config.data, self._launch, size) for size in (batch_bytes, 1))
        if workers < wanted:
            self._launch.say(
                f"note: {workers} workers decode images in the place of {wanted}, for which /dev/shm has no room: "
                "enlarge it (docker run --shm-size=8g)"
            )
        return workers


def evaluation_batch(shape: tuple[int, int, int]) -> int:
    """Images of a batch: fewer of more than 224x224 pixels, so that the first validation does not run out of memory.

    A function of the data's shape alone: the same on every launch, and in eval.py.
    """
    _, height, width = shape
    return max(1, min(EVALUATION_BATCH, EVALUATION_BATCH * 224 * 224 // (height * width)))


class EvaluationLoader:
    """A set in fixed order and batches of `evaluation_batch`, every process_index-th batch on this process."""

    def __init__(self, data: ImageSet, num_classes: int, launch: Launch, config: Config) -> None:
        self.data, self.num_classes = data, num_classes
        self._launch, self._config = launch, config

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Sample indices int64 (B,), images uint8 (B, H, W, C) and labels int64 (B,), on the device."""
        device = self._launch.device
        size = evaluation_batch(self.data.shape)
        starts = range(0, len(self.data), size)[self._launch.process_index :: self._launch.num_processes]
        batches = [torch.arange(start, min(start + size, len(self.data))) for start in starts]
        if self.data.images is not None:
            for samples in batches:
                images, labels = self.data.images.take(self.data.rows[samples]), self.data.labels[samples]
                yield to_device(samples, device), to_device(images, device), to_device(labels, device)
            return
        requests = (Request(samples.tolist(), samples.tolist()) for samples in batches)
        workers = choose_workers(self._config.data, self._launch, size * math.prod(self.data.shape))
        for images, labels, samples in copied(_data_loader(self.data, requests, workers, self._launch), device):
            yield samples, images, labels


class Request(NamedTuple):
    """The samples of one batch, by index, with a key each; `min_area` of their random crops (0: none)."""

    samples: list[int]
    keys: list[int]
    min_area: float = 0.0


class _Decoder(Dataset):
    """Answers requests; lives in the workers."""

    def __init__(self, data: ImageSet) -> None:
        self.data = data

    def __getitem__(self, request: Request) -> list[tuple[Tensor, ...]]:
        keys = torch.tensor(request.keys)
        read = read_samples(self.data, request.samples, keys, request.min_area)
        return [(*sample, key) for sample, key in zip(read, keys, strict=True)]


def read_samples(
    data: ImageSet, samples: Sequence[int], keys: Tensor, min_area: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Image uint8 (H, W, C) and label () of each sample, cut at random by its key if `min_area` is above 0.

    One that is skipped is black, and of SKIPPED_LABEL.
    """
    draws = crop_draws(keys).tolist() if min_area else [[]] * len(samples)
    channels, height, width = data.shape
    for index, drawn in zip(samples, draws, strict=True):
        pixels = data.crop(index, drawn, min_area) if min_area else data.load(index)
        if pixels is None:
            yield torch.zeros(height, width, channels, dtype=torch.uint8), torch.tensor(SKIPPED_LABEL)
        else:
            yield pixels, data.labels[index]


def _begin_work(program: int, worker: int) -> None:
    """The first thing a worker does: leave signals to the program, whose process `program` is, and die with it.

    torch's workers look for their program every few seconds, and for ever if it was killed while they began.
    """
    threading.excepthook = _without_broken_connections
    leave_signals_to(program if multiprocessing.get_start_method() == "fork" else os.getppid())


def _without_broken_connections(failure: threading.ExceptHookArgs) -> None:
    """Seen: a thread of a worker that was handing images to a program that was ending, and printed its traceback."""
    if not issubclass(failure.exc_type, ConnectionError | EOFError):
        threading.__excepthook__(failure)


_PREFETCH = 4
"""Batches that each worker has ready"""


def choose_workers(config: DataConfig, launch: Launch, batch_bytes: int = 1) -> int:
    """Processes that decode a streamed set for this one: as set, else a core each but one, and one at least on a GPU.

    Of the latter no more than find room in shared memory, of which a container may have 64 MB: a worker without dies.
    """
    if config.workers >= 0:
        return config.workers
    room = shared_memory_free() // local_processes() // ((_PREFETCH + 1) * batch_bytes)
    return min(max(launch.cores - 1, 1 if launch.device.type == "cuda" else 0), room)


def _data_loader(data: ImageSet, requests: Iterator[Request], workers: int, launch: Launch) -> Iterator[list[Tensor]]:
    loader = DataLoader(
        _Decoder(data),
        batch_size=None,
        sampler=requests,
        collate_fn=default_collate,
        num_workers=workers,
        pin_memory=launch.device.type == "cuda",
        prefetch_factor=_PREFETCH if workers else None,
        worker_init_fn=partial(_begin_work, os.getpid()),
    )
    try:
        yield from loader
    except (ConnectionError, EOFError) as broken:
        raise RuntimeError("DataLoader worker was killed while it handed over images") from broken
    except UserError as error:
        # From a worker, torch sends the whole traceback as the message; its last line is the one for the user.
        line = str(error).strip().splitlines()[-1]
        line = re.sub(r"^lockstep\.[\w.]+(UnreadableImage|UserError): ", "", line)
        # Frames in the traceback would hold on to the iterator until some later garbage collection, in whose
        # disorder its workers are not told to end and are waited for, five seconds each.
        raise UserError(line) from error.with_traceback(None)
