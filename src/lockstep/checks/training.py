"""Checks of what is trained: names in the settings, the run folder, data, the network, and one step."""

import math
import time
import zlib
from dataclasses import replace

import torch
from accelerate.utils import gather_object

from lockstep.checks.finding import NO_LAUNCH, Finding, Parts
from lockstep.data.images import build_data, find_decoded
from lockstep.data.loader import TrainLoader
from lockstep.data.sampler import build_sampler
from lockstep.errors import is_first_of_machine
from lockstep.files import path_of
from lockstep.models.network import build_network
from lockstep.models.summary import count_parameters
from lockstep.run.accelerate import require_trackers
from lockstep.run.folder import open_run
from lockstep.training.learner import build_learner, complete

_PROBES = 4  # images whose pixels are compared between processes
_LONG_PASS_SECONDS = 5.0


def check_choices(parts: Parts) -> Finding:
    """The network, optimizer, loss, schedule and trackers that the settings name exist."""
    parts.config = complete(parts.config, say=lambda _: None)
    require_trackers(parts.config.log.trackers)
    config = parts.config
    return Finding("ok", f"{config.model.name}, {config.optim.name}, {config.train.loss}, {config.schedule.name}")


def check_run(parts: Parts) -> Finding:
    """The run folder may be used with these settings."""
    if parts.launch is None:
        return NO_LAUNCH
    run = parts.run = open_run(parts.config, parts.launch)
    if run.is_finished:
        return Finding("warning", run.describe_result())
    return Finding("ok", f"{run.path} will be {'continued' if run.has_checkpoint else 'a new run'}")


def check_data(parts: Parts) -> Finding:
    """The data set opens here and some of its images can be decoded."""
    # Read image by image: decoding a whole set into the cache would take long, and is not what is in doubt.
    quick = replace(parts.config, data=replace(parts.config.data, memory_budget=0))
    run_dir = parts.run.path if parts.run else path_of(parts.config.run.root) / "doctor-without-a-run"
    data = build_data(quick, run_dir, write=False)
    sets = {"train": data.train, "val": data.val, "test": data.test}
    signature: dict[str, int | str] = {"classes": len(data.classes), "class names": _checksum(repr(data.classes))}
    for name, images in sets.items():
        signature[f"{name} images"] = len(images) if images else 0
        signature[f"{name} labels"] = _checksum(images.labels.numpy().tobytes() if images else b"")
    chosen = torch.linspace(0, len(data.train) - 1, _PROBES).long().tolist()
    pixels = [data.train.load(index) for index in chosen]
    signature["pixels"] = _checksum(b"".join(b"" if image is None else image.numpy().tobytes() for image in pixels))
    parts.data, parts.signature = data, signature
    counts = ", ".join(f"{signature[f'{name} images']} {name}" for name in sets if signature[f"{name} images"])
    channels, height, width = data.image_shape
    return Finding("ok", f"{counts} images of {height}x{width}x{channels} in {len(data.classes)} classes")


def check_same_data(parts: Parts) -> Finding | None:
    """Every process sees the same classes, lengths, labels and pixels as the main one."""
    if parts.launch is None or parts.launch.num_processes == 1:
        return None
    main = gather_object([parts.signature])[0]
    if parts.signature is None or main is None:
        return Finding("skipped", "the data cannot be read")
    others = [f"{key} {value}, not {main[key]}" for key, value in parts.signature.items() if value != main[key]]
    if others:
        problem = "; ".join(others)
        return Finding("failed", f"not the data of rank 0 ({problem}): put the same files on every machine")
    return Finding("ok", f"classes, labels and pixels are the same on all {parts.launch.num_processes} processes")


def check_cache(parts: Parts) -> Finding | None:
    """The images that earlier starts have decoded are as they were written; training looks when it uses them."""
    if not is_first_of_machine():
        return None
    if parts.data is None:
        return Finding("skipped", "the data cannot be read")
    sets = find_decoded(parts.config)
    if not sets:
        return Finding("ok", "images are decoded while training")
    if missing := [name for name, images in sets.items() if images is None]:
        return Finding("skipped", f"{' and '.join(missing)} images are decoded at the first start")
    whole = 0
    for images in sets.values():
        assert images is not None
        if damaged := images.damaged():
            first = f"{len(damaged)} of {len(images)} images are damaged, the first: {images.where(damaged[0])}"
            return Finding(
                "warning", f"{images.file}: {first}; decoded again when they are used, or by lockstep prepare"
            )
        whole += len(images)
    return Finding("ok", f"{whole} decoded images checked")


def check_network(parts: Parts) -> Finding:
    """The network can be built, with its first weights, for images of this size."""
    if parts.data is None:
        return Finding("skipped", "the data cannot be read")
    name = parts.config.model.name
    if parts.launch is None or parts.accelerator is None:
        model = build_network(parts.config, parts.data, torch.device("cpu"), resumes=False)
        return Finding("ok", f"{name} with {count_parameters(model):,} parameters")
    resumes = parts.run is not None and parts.run.has_checkpoint
    # Alone, without DDP and shared batch statistics: a failure here must not hang the others.
    parts.learner = build_learner(parts.config, parts.data, parts.accelerator, parts.launch.alone(), resumes=resumes)
    return Finding("ok", f"{name} with {count_parameters(parts.learner.model):,} parameters")


def check_step(parts: Parts) -> Finding:
    """One microbatch forward and backward, and one update: memory suffices and the loss is finite."""
    if parts.launch is None or parts.accelerator is None:
        return NO_LAUNCH
    if parts.learner is None or parts.data is None:
        return Finding("skipped", "there is no network")
    if parts.micro_batch_size is None:
        return Finding("skipped", "the global batch does not fit the launch")
    try:
        loss, seconds, accumulation = _train_once(parts)
        parts.learner.optimizer.step()
    except torch.OutOfMemoryError:
        remedy = f"lower --train.micro_batch_size={parts.micro_batch_size}"
        return Finding("failed", f"{parts.launch.device} has not enough memory for one microbatch: {remedy}")
    if not math.isfinite(loss):
        remedy = "look at --augment.mean and --augment.std, or set --runtime.precision=no"
        return Finding("failed", f"the first loss is {loss}: {remedy}")
    return Finding("ok", f"loss {loss:.3f}; about {seconds * accumulation:.3g} s per step, reading images not counted")


def _train_once(parts: Parts) -> tuple[float, float, int]:
    """Loss and seconds of this process's first microbatch, and the number of its microbatches per step."""
    config, data, launch = parts.config, parts.data, parts.launch
    assert data and launch and parts.learner and parts.micro_batch_size
    # One worker is enough to see whether workers start here.
    quick = replace(config, data=replace(config.data, workers=min(abs(config.data.workers), 1)))
    sampler = build_sampler(config, data.train.drawn_labels, parts.micro_batch_size)
    loader = TrainLoader(data.train, sampler, launch, quick)
    batch = next(loader.batches(range(1), parts.learner.transform.rearrange))
    seconds = math.inf
    for _ in range(2):  # the first pass is slow everywhere: the second tells the time, unless that would be long
        start = time.perf_counter()
        loss = parts.learner.rehearse(batch).item()  # which waits for the device
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > _LONG_PASS_SECONDS:
            break
    return loss, seconds, loader.accumulation


def _checksum(content: str | bytes) -> str:
    return f"{zlib.crc32(content.encode() if isinstance(content, str) else content):08x}"
