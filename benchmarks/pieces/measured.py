"""Pieces that measure steps of train.py's own loop in their own process."""

import argparse
import itertools
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from exact_cost import both_sides, cost_ratios, settings_of
from stretch import prepared, stretch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lockstep.launch.accelerator import build_accelerator
from lockstep.settings.cli import parse_config
from pieces.place import Place


class Work(NamedTuple):
    """A network, its images, samples of a step on a GPU and in a rehearsal, and images per second to be reached."""

    model: str
    shape: str
    batch_size: int
    rehearsal_batch_size: int
    eager: float
    compiled: float | None = None


WORK = {
    "simple_cnn": Work("simple_cnn", "28x28x1", 4096, 16, 1e6),
    "fashion_cnn": Work("fashion_cnn", "28x28x1", 2048, 16, 500e3),
    "cifar10_resnet18": Work("timm/resnet18", "32x32x3", 512, 4, 45e3, 60e3),
    "resnet50": Work("timm/resnet50", "224x224x3", 256, 2, 4.5e3, 6e3),
}
EXACT_COST = 1.07
BUSY_SHARE = 0.95
_PLAIN_WORKERS = 8


def _batch_size(place: Place, work: Work) -> int:
    return work.rehearsal_batch_size if place.is_rehearsal else work.batch_size


def _settings(place: Place, work: Work, *more: str) -> list[str]:
    size = _batch_size(place, work)
    settings = [f"--model.name={work.model}", f"--data.source=synthetic:{work.shape}x{4 * size + 64}"]
    settings += [f"--train.batch_size={size}", f"--train.micro_batch_size={size}", "--runtime.precision=bf16"]
    settings += ["--augment.crop_padding=4", "--augment.flip=true", "--augment.rotation=0", "--augment.zoom=0"]
    return [*settings, "--optim.name=sgd", "--optim.momentum=0.9", "--optim.lr=0.001", *more]


def _steps(place: Place) -> tuple[int, int]:
    """To warm up, and of a stretch that is timed."""
    return (1, 2) if place.is_rehearsal else (10, 40)


def _wait(place: Place) -> None:
    if not place.is_rehearsal:
        torch.cuda.synchronize()


def _seconds(place: Place, run: Callable[[int], Any], repeats: int = 3) -> float:
    """Of one step: median of stretches, after some steps to warm up."""
    warm, steps = _steps(place)
    run(warm)
    times = []
    for _ in range(repeats):
        _wait(place)
        begun = time.perf_counter()
        run(steps)
        _wait(place)
        times.append((time.perf_counter() - begun) / steps)
    return statistics.median(times)


# ---- speed and memory


def speed(place: Place, name: str, *, compiled: bool) -> dict[str, Any]:
    """Images per second of the loop, of the bare step and of a plain script; share of the peak; memory."""
    work = WORK[name]
    size = _batch_size(place, work)
    with prepared(*_settings(place, work, f"--runtime.compile={'default' if compiled else 'off'}")) as training:
        ours = size / _seconds(place, lambda steps: stretch(training, steps))
        found: dict[str, Any] = {"images_per_second": ours, "peak_memory_gb": _peak_memory_gb(place)}
        _leave_exactness()
        found["bare step"] = size / _seconds(place, bare_step(training, size))
        if not compiled:
            try:
                found["plain script"] = _plain_script(place, work, size)
            except (ImportError, RuntimeError, ValueError) as failure:  # the figures of ours stand without it
                found["plain script"] = f"{type(failure).__name__}: {failure}"
        flops = _flops_of_training(training)
    found["share_of_peak"] = ours * flops / _peak_flops(place)
    target = work.compiled if compiled else work.eager
    return found | {"target": target, "passed": place.is_rehearsal or target is None or ours >= target}


def _peak_memory_gb(place: Place) -> float:
    if place.is_rehearsal:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return torch.cuda.max_memory_allocated() / 1e9


def _leave_exactness() -> None:
    """What other programs do not have need not slow them."""
    torch.set_deterministic_debug_mode("default")
    torch.backends.cudnn.benchmark = True


def bare_step(training: Any, size: int) -> Callable[[int], None]:
    """Steps of network, loss and optimizer alone, on a batch that stays."""
    learner, device = training.learner, training.launch.device
    images = torch.rand(size, *training.data.image_shape, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    label_smoothing = learner.config.train.label_smoothing

    def run(steps: int) -> None:
        for _ in range(steps):
            F.cross_entropy(learner.network(images), labels, label_smoothing=label_smoothing).backward()
            learner.optimizer.optimizer.step()
            learner.optimizer.optimizer.zero_grad()

    learner.optimizer.optimizer.found_inf = None
    return run


def _plain_script(place: Place, work: Work, size: int) -> float:
    """Images per second of plain_accelerate.py's loop in this process."""
    from accelerate import Accelerator
    from plain_accelerate import build_parts, train_epoch

    images = 64 if place.is_rehearsal else max(2 * _PLAIN_WORKERS * size, 8192)
    options = argparse.Namespace(
        source=f"synthetic:{work.shape}x{images}",
        model=work.model,
        micro_batch_size=size,
        workers=0 if place.is_rehearsal else _PLAIN_WORKERS,
        lr=0.001,
    )
    accelerator = Accelerator(cpu=place.is_rehearsal)
    parts = build_parts(options, accelerator)
    epochs: Iterable[None] = itertools.chain.from_iterable(train_epoch(accelerator, *parts) for _ in range(1000))
    done = iter(epochs)
    return size / _seconds(place, lambda count: [next(done) for _ in range(count)], repeats=1)


def _flops_of_training(training: Any) -> float:
    """Of one image: the backward pass counts as two forwards."""
    model = training.learner.model.eval()
    like = next(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward(like.new_zeros(1, *training.data.image_shape))  # which is not compiled
    return 3 * counter.get_total_flops()


def _peak_flops(place: Place) -> float:
    """Floating-point operations per second of a large bf16 matrix product on this device."""
    side, times = (256, 2) if place.is_rehearsal else (8192, 50)
    a = torch.randn(side, side, dtype=torch.bfloat16, device=place.device)

    def run(steps: int) -> None:
        for _ in range(times * steps):
            a @ a

    return 2 * side**3 * times / _seconds(place, run)


# ---- what the promise costs


def exact(place: Place, name: str) -> dict[str, Any]:
    """Steps in the one order and with deterministic kernels beside steps without, in turn; 8 microbatches each."""
    work = WORK[name]
    size = max(2, _batch_size(place, work) // 8)
    config = parse_config(settings_of(work.model, f"synthetic:{work.shape}x{8 * size * 2}", size, "bf16"))
    accelerator, launch = build_accelerator(config.runtime)
    sides = both_sides(config, accelerator, launch)
    ratios = cost_ratios(sides, *((1, 1) if place.is_rehearsal else (10, 9)))
    ratio = statistics.median(ratios)
    found = {"ratio": ratio, "from": min(ratios), "to": max(ratios), "target": EXACT_COST}
    return found | {"passed": place.is_rehearsal or name != "resnet50" or ratio <= EXACT_COST}


# ---- waiting


class _Reads(TorchDispatchMode):
    """Counts numbers that the host takes from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name == "aten::_local_scalar_dense"
        return function(*args, **(kwargs or {}))


def waits(place: Place) -> dict[str, Any]:
    """How often the host waits for the device in a step without a log line, with four microbatches and much on."""
    work = WORK["fashion_cnn"]
    size = _batch_size(place, work)
    more = [
        f"--train.micro_batch_size={size // 4}",
        "--train.ema_decay=0.9",
        "--optim.clip_norm=1",
    ]
    more += ["--augment.rotation=5", "--augment.perspective=0.1", "--augment.erasing=0.2", "--model.dropout=0.1"]
    if not place.is_rehearsal:  # on a CPU, torch's one_hot looks at every label
        more += ["--augment.mixup=1", "--augment.cutmix=1"]
    steps = 8
    with prepared(*_settings(place, work, *more)) as training:
        stretch(training, 2)
        if place.is_rehearsal:
            with _Reads() as reads:
                stretch(training, steps)
            return {"waits_per_step": reads.count / steps, "target": 0, "passed": reads.count == 0}
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            stretch(training, steps)
    found = [f"{note.filename}:{note.lineno}" for note in noted if "synchronizing" in str(note.message)]
    return {"waits_per_step": len(found) / steps, "where": sorted(set(found)), "target": 0, "passed": not found}


def busy(place: Place, name: str) -> dict[str, Any]:
    """The share of a stretch's time in which the device computes, by the profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    kind = DeviceType.CPU if place.is_rehearsal else DeviceType.CUDA
    activity = ProfilerActivity.CPU if place.is_rehearsal else ProfilerActivity.CUDA
    warm, steps = _steps(place)
    with prepared(*_settings(place, WORK[name])) as training:
        stretch(training, warm)
        _wait(place)
        with profile(activities=[activity]) as profiled:
            stretch(training, steps)
            _wait(place)
    # Marks such as `Optimizer.step` span pauses between kernels, too.
    events = [
        e for e in profiled.events() if e.device_type == kind and not e.name.startswith(("Optimizer.", "Profiler"))
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    covered, end = 0.0, spans[0][0]
    for begin, until in spans:
        covered += max(0.0, until - max(begin, end))
        end = max(end, until)
    share = covered / (end - spans[0][0])
    return {"busy_share": share, "target": BUSY_SHARE, "passed": place.is_rehearsal or share >= BUSY_SHARE}
