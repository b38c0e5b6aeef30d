"""Loaders: every launch together sees the sampler's microbatches, cached or streamed, whatever the workers."""

import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from programs import start
from torch import Tensor

from lockstep.data.images import SKIPPED_LABEL, Data, ImageSet, build_data
from lockstep.data.loader import (
    EVALUATION_BATCH,
    Batch,
    EvaluationLoader,
    TrainLoader,
    _without_broken_connections,
    choose_workers,
    evaluation_batch,
)
from lockstep.data.sampler import Sampler, build_sampler
from lockstep.launch.accelerator import Launch
from lockstep.randomness import sample_keys
from lockstep.settings.config import AugmentConfig, CheckpointConfig, Config, DataConfig, RunConfig, TrainConfig

BATCH_SIZE, MICRO = 16, 4
LAUNCHES = {(1, 4): 1, (2, 2): 2, (4, 1): 4}


def launch_of(num_processes: int = 1, index: int = 0) -> Launch:
    return Launch(torch.device("cpu"), num_processes, index, index, "no", cores=1)


def config_of(folder: Path, *, source: str = "synthetic:12x10x3x90", augment: Any = None, **data: Any) -> Config:
    return Config(
        run=RunConfig(seed=5),
        data=DataConfig(source=source, cache_dir=str(folder / "cache"), **data),
        augment=augment or AugmentConfig(),
        train=TrainConfig(batch_size=BATCH_SIZE, micro_batch_size=MICRO),
        checkpoint=CheckpointConfig(),
    )


def data_of(config: Config, folder: Path) -> Data:
    return build_data(config, folder, write=False)


def pixels_of(data: ImageSet, index: int) -> torch.Tensor:
    pixels = data.load(index)
    assert pixels is not None
    return pixels


def train_loader(config: Config, folder: Path, launch: Launch | None = None) -> TrainLoader:
    data = data_of(config, folder).train
    sampler = build_sampler(config, data.labels.numpy(), MICRO)
    return TrainLoader(data, sampler, launch or launch_of(), config)


def everything(batches: Iterator[Any]) -> list[torch.Tensor]:
    """All batches in a row: images, labels, keys."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def assert_equal(ours: Iterator[Any], theirs: Iterator[Any]) -> None:
    for one, other in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(one, other)


def photos(folder: Path, *, broken: int | None = None, count: int = 40) -> Path:
    """Two classes of 24x20 photos of noise as JPEG; returns the folder. One of them can be cut short."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("train" if i < count - 8 else "test") / "ab"[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20, 24)).save(path)
        if i == broken:
            path.write_bytes(path.read_bytes()[:200])
    return folder


# ---- training


@pytest.mark.parametrize(("processes", "accumulation"), LAUNCHES)
@pytest.mark.parametrize("memory_budget", [2.0, 0.0])
def test_processes_together_give_the_samplers_microbatches(
    tmp_path: Path, processes: int, accumulation: int, memory_budget: float
) -> None:
    config = config_of(tmp_path, memory_budget=memory_budget)
    data, steps = data_of(config, tmp_path).train, range(3, 8)  # over the end of an epoch
    sampler = Sampler(len(data), BATCH_SIZE, MICRO, seed=5)
    loaders = [train_loader(config, tmp_path, launch_of(processes, index)) for index in range(processes)]
    assert all(loader.accumulation == accumulation for loader in loaders)
    parts = [loader.batches(steps) for loader in loaders]
    for step in steps:
        for number in range(BATCH_SIZE // MICRO):
            process = number * processes // (BATCH_SIZE // MICRO)  # blocks, one after the other
            assert number in loaders[process].numbers
            batch, expected = next(parts[process]), sampler.microbatch(step, number)
            samples = torch.from_numpy(expected.samples)
            assert torch.equal(batch.labels, data.labels[samples])
            pixels = torch.stack([pixels_of(data, int(i)) for i in samples])
            assert batch.images.dtype == torch.uint8 and torch.equal(batch.images, pixels)
            keys = sample_keys(5, expected.epoch, data.rows[samples], torch.zeros(MICRO, dtype=torch.int64))
            assert torch.equal(batch.keys, keys)
    for rest in parts:
        assert next(rest, None) is None


@pytest.mark.parametrize(("memory_budget", "block_bytes"), [(2.0, 1 << 20), (2.0, 1), (0.0, 1 << 20)])
def test_images_are_rearranged_by_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_budget: float, block_bytes: int
) -> None:
    monkeypatch.setattr("lockstep.data.loader._BLOCK_BYTES", block_bytes)
    loader = train_loader(config_of(tmp_path, memory_budget=memory_budget), tmp_path)
    steps, seen = range(loader.sampler.steps_per_epoch + 3), set()

    def mirror(images: Tensor, keys: Tensor) -> Tensor:
        seen.add(len(images))
        assert len(keys) == len(images)
        return images.flip(2)

    for plain, mirrored in zip(loader.batches(steps), loader.batches(steps, mirror), strict=True):
        assert len(plain.images) == MICRO and torch.equal(plain.images.flip(2), mirrored.images)
        assert torch.equal(plain.labels, mirrored.labels) and torch.equal(plain.keys, mirrored.keys)
    assert (max(seen) > MICRO) == (memory_budget > 0 and block_bytes > 1), seen


@pytest.mark.parametrize("memory_budget", [2.0, 0.0])
def test_starting_later_equals_skipping(tmp_path: Path, memory_budget: float) -> None:
    loader = train_loader(config_of(tmp_path, memory_budget=memory_budget), tmp_path, launch_of(2, 1))
    whole = everything(loader.batches(range(9)))
    late = everything(loader.batches(range(6, 9)))
    for complete, part in zip(whole, late, strict=True):
        assert torch.equal(complete[6 * 2 * MICRO :], part)


def test_keys_change_with_the_epoch_and_the_repeat(tmp_path: Path) -> None:
    config = config_of(tmp_path, repeats=2)
    loader = train_loader(config, tmp_path)
    _, labels, keys = everything(loader.batches(range(2 * loader.sampler.steps_per_epoch)))
    assert len(keys.unique()) == len(keys)
    step = everything(loader.batches(range(1)))
    assert torch.equal(step[0][: BATCH_SIZE // 2], step[0][BATCH_SIZE // 2 :]), "each image comes twice in a step"


def test_streamed_and_cached_are_equal(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    config = config_of(tmp_path, source=f"folder:{folder}", val_fraction=0.0, augment=AugmentConfig(image_size=12))
    cached = train_loader(config, tmp_path)
    streamed = train_loader(replace(config, data=replace(config.data, memory_budget=0.0)), tmp_path)
    assert cached._images is not None and streamed._images is None
    assert_equal(cached.batches(range(4)), streamed.batches(range(4)))


@pytest.mark.parametrize("resized_crop", [0.0, 0.3])
def test_workers_leave_no_trace(tmp_path: Path, resized_crop: float) -> None:
    folder = photos(tmp_path / "photos")
    augment = AugmentConfig(image_size=12, resized_crop=resized_crop)
    config = config_of(tmp_path, source=f"folder:{folder}", memory_budget=0.0, val_fraction=0.0, augment=augment)
    alone = train_loader(config, tmp_path)
    helped = train_loader(replace(config, data=replace(config.data, workers=2)), tmp_path)
    assert_equal(alone.batches(range(5)), helped.batches(range(5)))


def test_workers_take_the_cores_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at least where a GPU computes, as many as are set, and none without room for what they hand over."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("lockstep.data.loader.shared_memory_free", lambda: 64 * 2**20)
    of_cores = {cores: replace(launch_of(), cores=cores) for cores in (1, 2, 9)}
    assert [choose_workers(DataConfig(), launch) for launch in of_cores.values()] == [0, 1, 8]
    gpu = replace(of_cores[1], device=torch.device("cuda"))
    assert choose_workers(DataConfig(), gpu) == 1 and choose_workers(DataConfig(workers=0), gpu) == 0
    batch = 32 * 224 * 224 * 3  # 4.6 MiB
    assert choose_workers(DataConfig(), of_cores[9], batch) == 2
    assert choose_workers(DataConfig(), gpu, 4 * batch) == 0
    assert choose_workers(DataConfig(workers=5), gpu, 4 * batch) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_workers(DataConfig(), of_cores[9], batch) == 1


def test_fewer_workers_for_want_of_shared_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    config, launch = config_of(tmp_path, memory_budget=0.0), replace(launch_of(), cores=3)
    streamed = train_loader(config, tmp_path, launch)
    monkeypatch.setattr("lockstep.data.loader.shared_memory_free", lambda: 2000)
    everything(streamed.batches(range(2)))
    assert capsys.readouterr().out.startswith("note: 0 workers decode images in the place of 2")


STREAMING = """
import sys, time, torch
from pathlib import Path
from lockstep.launch.accelerator import Launch
from lockstep.data import loader

begin = loader._begin_work

def begin_late(program, worker):
    Path("worker").write_text(str(loader.os.getpid()))
    time.sleep(float(sys.argv[1]))
    begin(program, worker)
    time.sleep(1000)

loader._begin_work = begin_late
launch = Launch(torch.device("cpu"), 1, 0, 0, "no", 1)
next(iter(loader._data_loader(None, iter([[]]), 1, launch)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("seconds", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_worker_dies_with_its_program_even_if_it_had_not_begun(seconds: int, tmp_path: Path) -> None:
    """torch's own watch over its program starts after that: such a worker stayed for ever."""
    program = start([sys.executable, "-c", STREAMING, str(seconds)], tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert time.monotonic() < deadline and program.poll() is None, program.communicate()
        time.sleep(0.02)
    worker = psutil.Process(int((tmp_path / "worker").read_text()))
    time.sleep(0 if seconds else 1)
    program.kill()
    program.wait()
    assert not psutil.wait_procs([worker], timeout=20)[1], "an orphan"


def test_random_crops_of_large_images_follow_their_keys(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    augment = AugmentConfig(image_size=12, resized_crop=0.3)
    config = config_of(tmp_path, source=f"folder:{folder}", val_fraction=0.0, augment=augment)
    loader = train_loader(config, tmp_path)
    assert loader._precrops, "images larger than image_size must be cropped where they are decoded"
    first, again = (everything(loader.batches(range(2))) for _ in range(2))
    assert torch.equal(first[0], again[0]) and first[0].shape == (32, 12, 12, 3)
    data = data_of(config, tmp_path).train
    whole = torch.stack([pixels_of(data, int(i)) for i in loader.sampler.microbatch(0, 0).samples])
    assert not torch.equal(first[0][:MICRO], whole), "no random crop was made"
    epoch = everything(loader.batches(range(2, 4)))
    by_key = dict(zip(first[2].tolist(), first[0], strict=True))
    assert not by_key.keys() & set(epoch[2].tolist()), "a later epoch crops otherwise"


def test_a_random_crop_is_the_box_of_its_key(tmp_path: Path) -> None:
    """On an image whose pixels say where they are."""
    from lockstep.augment.geometry import crop_boxes

    for i in range(24):
        path = tmp_path / "ramps" / ("train" if i < 20 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[0:200, 0:240]
        Image.fromarray(np.stack([x, y, x * 0], 2).astype(np.uint8)).save(path)
    augment = AugmentConfig(image_size=20, resized_crop=0.2)
    config = config_of(tmp_path, source=f"folder:{tmp_path / 'ramps'}", val_fraction=0.0, augment=augment)
    images, _, keys = next(train_loader(config, tmp_path).batches(range(1)))
    x, y, width, height = crop_boxes(keys, 0.2, 240 / 200)
    steps = (torch.arange(20) + 0.5) / 20
    columns = (x[:, None] - width[:, None] / 2 + width[:, None] * steps) * 240 - 0.5
    rows = (y[:, None] - height[:, None] / 2 + height[:, None] * steps) * 200 - 0.5
    inner = slice(2, -2)  # at the border antialiasing has one side only
    torch.testing.assert_close(images[:, 10, inner, 0].double(), columns[:, inner], rtol=0, atol=1.0)
    torch.testing.assert_close(images[:, inner, 10, 1].double(), rows[:, inner], rtol=0, atol=1.0)


# ---- evaluation


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("memory_budget", [2.0, 0.0])
def test_evaluation_covers_every_sample_once_in_whole_batches(
    tmp_path: Path, processes: int, memory_budget: float
) -> None:
    config = config_of(tmp_path, source="synthetic:4x4x1x5005", memory_budget=memory_budget)
    data = data_of(config, tmp_path)
    seen = []
    for index in range(processes):
        for samples, images, labels in EvaluationLoader(
            data.test, data.num_classes, launch_of(processes, index), config
        ):
            first = int(samples[0])
            assert first % EVALUATION_BATCH == 0, "a batch must be the same samples at any number of processes"
            assert len(samples) == min(EVALUATION_BATCH, len(data.test) - first)
            assert torch.equal(labels, data.test.labels[samples])
            for i in (0, len(samples) - 1):
                assert torch.equal(images[i], pixels_of(data.test, int(samples[i])))
            seen.append(samples)
    assert len(data.test) == 1001
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(data.test)))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_do_not_depend_on_workers(tmp_path: Path, workers: int) -> None:
    config = config_of(tmp_path, source="synthetic:4x4x1x3000", memory_budget=0.0, workers=workers)
    cached = replace(config, data=replace(config.data, memory_budget=1.0))
    ours, theirs = (
        EvaluationLoader(data_of(c, tmp_path).test, 10, launch_of(), c) for c in (config, cached)
    )  # fmt: skip
    assert_equal(iter(ours), iter(theirs))


# ---- damage


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resized_crop", [0.0, 0.3])
def test_a_broken_image_is_one_line_with_its_path(tmp_path: Path, workers: int, resized_crop: float) -> None:
    folder = photos(tmp_path / "photos", broken=7)
    augment = AugmentConfig(image_size=12, resized_crop=resized_crop)
    config = config_of(
        tmp_path, source=f"folder:{folder}", memory_budget=0.0, val_fraction=0.0, workers=workers, augment=augment
    )
    with pytest.raises(ValueError) as error:
        everything(train_loader(config, tmp_path).batches(range(2)))
    message = str(error.value)
    assert message.startswith(str(folder / "train" / "b" / "007.jpg")), message
    assert "\n" not in message and "--data.on_error=skip" in message
    assert not multiprocessing.active_children(), "the workers were left running"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_of_another_size_is_one_line_with_its_path(tmp_path: Path, workers: int) -> None:
    folder = photos(tmp_path / "photos")
    odd = folder / "train" / "a" / "006.jpg"
    Image.new("RGB", (9, 9)).save(odd)
    config = config_of(
        tmp_path, source=f"folder:{folder}", memory_budget=0.0, val_fraction=0.0, workers=workers
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        everything(train_loader(config, tmp_path).batches(range(2)))
    assert str(error.value).startswith(f"{odd} is 9x9 where others are 24x20"), error.value


@pytest.mark.parametrize("resized_crop", [0.0, 0.3])
def test_a_skipped_image_is_black_and_leaves_the_order_alone(tmp_path: Path, resized_crop: float) -> None:
    whole, broken = photos(tmp_path / "whole"), photos(tmp_path / "broken", broken=7)
    augment = AugmentConfig(image_size=12, resized_crop=resized_crop)

    def batches(folder: Path, budget: float, workers: int) -> Batch:
        config = config_of(
            tmp_path, source=f"folder:{folder}", memory_budget=budget, val_fraction=0.0, on_error="skip",
            workers=workers, augment=augment,
        )  # fmt: skip
        return Batch(*everything(train_loader(config, tmp_path).batches(range(2))))

    good = batches(whole, 0.0, 0)
    for budget, workers in ((0.0, 0), (0.0, 2), (2.0, 0)):
        bad = batches(broken, budget, workers)
        skipped = bad.labels == SKIPPED_LABEL
        assert skipped.sum() == 1 and not bad.images[skipped].any() and good.images[skipped].any()
        assert torch.equal(bad.keys, good.keys)
        assert torch.equal(bad.labels[~skipped], good.labels[~skipped])
        assert torch.equal(bad.images[~skipped], good.images[~skipped])


def test_a_skipped_image_of_a_streamed_evaluation_has_no_label(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", broken=35)  # the second of the test images of class b
    config = config_of(
        tmp_path, source=f"folder:{folder}", memory_budget=0.0, val_fraction=0.0, on_error="skip",
        augment=AugmentConfig(image_size=12),
    )  # fmt: skip
    data = data_of(config, tmp_path)
    ((samples, images, labels),) = EvaluationLoader(data.test, 2, launch_of(), config)
    (place,) = (labels == SKIPPED_LABEL).nonzero().flatten().tolist()
    assert torch.equal(samples, torch.arange(8)) and data.test.split.where(place).endswith("035.jpg")
    assert not images[place].any()


def test_a_worker_says_nothing_of_a_program_that_ended(capfd: pytest.CaptureFixture[str]) -> None:
    failures = [(ConnectionResetError, ConnectionResetError()), (EOFError, EOFError()), (KeyError, KeyError("slip"))]
    for kind, error in failures:
        _without_broken_connections(threading.ExceptHookArgs((kind, error, None, None)))
    printed = capfd.readouterr().err
    assert "KeyError: 'slip'" in printed and "Connection" not in printed and "EOF" not in printed


@pytest.mark.parametrize(("side", "images"), [(8, 256), (224, 256), (448, 64), (1024, 12), (5000, 1)])
def test_large_images_are_evaluated_in_smaller_batches(side: int, images: int) -> None:
    assert evaluation_batch((3, side, side)) == images
