"""What build_data makes of a source: memory or streaming, validation split, channels, normalisation."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from programs import CIFAR10

from lockstep.data.images import Data, build_data
from lockstep.settings.config import AugmentConfig, Config, DataConfig

needs_cifar = pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"{CIFAR10} is absent")


def build(place: Path, source: str, augment: AugmentConfig | None = None, *, write: bool = True, **data: Any) -> Data:
    data_config = DataConfig(source=source, cache_dir=str(place / "cache"), root=str(place / "root"), **data)
    return build_data(Config(data=data_config, augment=augment or AugmentConfig()), place / "run", write=write)


def make_folder(root: Path, sizes: list[tuple[int, int]], splits: tuple[str, ...] = ("train", "val", "test")) -> str:
    """In every split two classes, each with one image per size (width, height); pixels are random."""
    generator = np.random.default_rng(0)
    for split in splits:
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index, (width, height) in enumerate(sizes):
                pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return f"folder:{root}"


def test_digits_by_default(tmp_path) -> None:
    data = build(tmp_path, "embedded:digits")
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 144, 359)
    assert data.image_shape == data.train.shape == (1, 8, 8) and data.num_classes == len(data.classes) == 10
    assert data.train.images is data.val.images  # one cache for both parts
    assert not set(data.train.rows.tolist()) & set(data.val.rows.tolist())
    assert data.train.labels.dtype == data.train.rows.dtype == torch.int64
    assert (tmp_path / "run" / "split.json").exists()


def test_rows_lead_to_pixels_and_labels(tmp_path) -> None:
    data = build(tmp_path, "embedded:digits")
    assert data.val is not None
    for image_set in (data.train, data.val.subset(torch.tensor([7, 3])), data.test.subset(np.array([200, 1, 9]))):
        for index in range(0, len(image_set), 50):
            row = int(image_set.rows[index])
            pixels = np.asarray(image_set.split.read(row))[..., None]
            loaded = image_set.load(index)
            assert loaded is not None and np.array_equal(loaded.numpy(), pixels)
            assert image_set.images is not None
            assert np.array_equal(image_set.images.take(image_set.rows[[index]])[0].numpy(), pixels)
            assert int(image_set.labels[index]) == image_set.split.labels[row]


def test_statistics_are_those_of_the_training_part(tmp_path) -> None:
    data = build(tmp_path, "synthetic:8x8x3x60", val_fraction=0.5)
    pixels = np.stack([np.asarray(data.train.load(index)) for index in range(len(data.train))]) / 255
    assert np.allclose(data.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12, atol=0)
    assert np.allclose(data.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12, atol=0)


def test_settings_overrule_the_statistics(tmp_path) -> None:
    data = build(tmp_path, "synthetic:8x8x3x60", AugmentConfig(mean=(0.5,), std=(0.1, 0.2, 0.3)))
    assert (data.mean, data.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="--augment.std need 1 or 3 values"):
        build(tmp_path, "synthetic:8x8x3x60", AugmentConfig(mean=(0.5, 0.5), std=(0.1, 0.2)))


def test_the_budget_decides_between_memory_and_streaming(tmp_path) -> None:
    size_gib = (100 + 20) * 32 * 32 * 3 / 2**30
    in_memory = build(tmp_path, "synthetic:32x32x3x100", memory_budget=size_gib)
    streamed = build(tmp_path, "synthetic:32x32x3x100", memory_budget=size_gib * 0.999)
    assert in_memory.train.images is not None and in_memory.test.images is not None
    assert streamed.train.images is None and streamed.test.images is None
    assert streamed.mean == (0.485, 0.456, 0.406) and streamed.std == (0.229, 0.224, 0.225)
    assert torch.equal(streamed.train.rows, in_memory.train.rows)
    for index in (0, 50, 89):
        one, other = streamed.train.load(index), in_memory.train.load(index)
        assert one is not None and other is not None and torch.equal(one, other)


def test_random_crops_of_larger_images_stream_the_training_set_alone(tmp_path) -> None:
    source = make_folder(tmp_path / "set", [(48, 40), (36, 50), (40, 40)])
    data = build(tmp_path, source, AugmentConfig(image_size=32, resized_crop=0.08, eval_crop=0.875))
    assert data.train.images is None and data.val is not None
    assert data.val.images is not None and data.val.images.take(data.val.rows).shape == (6, 32, 32, 3)
    whole = data.train.crop(1, [0.0] * 22, 1.0)  # 36 x 50: the widest box of its whole area does not fit
    assert whole is not None and whole.shape == (32, 32, 3)
    loaded = data.train.load(1)
    assert loaded is not None and loaded.shape == (32, 32, 3)
    small = build(tmp_path, source, AugmentConfig(image_size=64, resized_crop=0.08))
    assert small.train.images is not None  # nothing larger than the target: the cache has all there is


def test_the_same_split_on_every_process_and_after_a_restart(tmp_path) -> None:
    other = build(tmp_path, "embedded:digits", write=False)
    assert not (tmp_path / "run").exists()
    first, again = build(tmp_path, "embedded:digits"), build(tmp_path, "embedded:digits", write=False)
    assert first.val is not None and again.val is not None and other.val is not None
    assert torch.equal(first.val.rows, again.val.rows) and torch.equal(first.val.rows, other.val.rows)


def test_validation_is_the_sources_own_or_none(tmp_path) -> None:
    own = build(tmp_path, make_folder(tmp_path / "set", [(8, 8)] * 3), val_fraction=0.3)
    assert own.val is not None and own.val.split.name == "val" and len(own.train) == 6
    assert not (tmp_path / "run").exists()
    assert build(tmp_path, "embedded:digits", val_fraction=0.0).val is None
    shared = build(tmp_path, make_folder(tmp_path / "two", [(8, 8)] * 3, ("train", "val")))
    assert shared.test is shared.val  # a source without test split


def test_without_a_test_set_the_validation_set_tests(tmp_path) -> None:
    source = make_folder(tmp_path / "set", [(8, 8)] * 6, ("",))
    data = build(tmp_path, source, test_fraction=0.0, val_fraction=0.25)
    assert data.val is data.test and (len(data.train), len(data.test)) == (9, 3)
    with pytest.raises(ValueError, match="nothing to test on: raise --data.test_fraction or --data.val_fraction"):
        build(tmp_path, source, test_fraction=0.0, val_fraction=0.0)


def test_few_samples_of_a_source_with_its_own_splits(tmp_path) -> None:
    data = build(tmp_path, make_folder(tmp_path / "set", [(8, 8)] * 5), samples_per_class=2)
    assert data.val is not None and (len(data.train), len(data.val)) == (4, 10)
    assert data.train.labels.tolist() == data.train.drawn_labels.tolist() == [0, 0, 1, 1]
    assert (tmp_path / "run" / "split.json").exists()


def test_sizes_must_agree_unless_a_size_is_set(tmp_path) -> None:
    source = make_folder(tmp_path / "set", [(9, 8), (9, 8), (8, 9)])
    with pytest.raises(ValueError, match=r"/2.png is 9x8 where others are 8x9: set --augment.image_size"):
        build(tmp_path, source)
    streamed = build(tmp_path, source, memory_budget=0.0)
    with pytest.raises(ValueError, match=r"/2.png is 9x8 where others are 8x9"):
        streamed.train.load(2)
    assert build(tmp_path, source, AugmentConfig(image_size=8)).image_shape == (3, 8, 8)
    with pytest.raises(ValueError, match="--augment.eval_crop=0.5 needs --augment.image_size"):
        build(tmp_path, source, AugmentConfig(eval_crop=0.5))


def test_grey_files_make_one_channel(tmp_path) -> None:
    source = make_folder(tmp_path / "set", [(8, 8)] * 3)
    for path in (tmp_path / "set").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert build(tmp_path, source).image_shape == (1, 8, 8)
    assert build(tmp_path, source, memory_budget=0.0).mean == (0.449,)


@pytest.mark.parametrize("memory_budget", [2.0, 0.0])
@pytest.mark.parametrize("victim", [0, 4])
def test_an_unreadable_image_ends_the_run_or_is_skipped(tmp_path, caplog, memory_budget: float, victim: int) -> None:
    source = make_folder(tmp_path / "set", [(8, 8)] * 10)
    path = tmp_path / "set" / "train" / "cat" / f"{victim}.png"
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(ValueError, match=f"{path} cannot be decoded"):
        data = build(tmp_path, source, memory_budget=memory_budget)
        data.train.load(victim)
    with caplog.at_level(logging.WARNING):
        data = build(tmp_path, source, memory_budget=memory_budget, on_error="skip")
    assert [data.train.load(index) is None for index in range(20)] == [index == victim for index in range(20)]
    assert data.train.crop(victim, [0.0] * 22, 0.5) is None
    assert len(data.train) == 20  # the order of all other samples stays
    if memory_budget:
        assert torch.nonzero(data.train.labels == -100).flatten().tolist() == [victim]
        assert f"1 of 20 images skipped, the first: {path}" in caplog.text
        kept = np.stack([np.asarray(data.train.load(index)) for index in range(20) if index != victim])
        assert np.allclose(data.mean, kept.mean(axis=(0, 1, 2)) / 255)


def test_classes_of_the_network(tmp_path) -> None:
    data = build(tmp_path, "synthetic:8x8x1x40", num_classes=12)
    assert data.num_classes == 12 and len(data.classes) == 10
    with pytest.raises(ValueError, match="--data.num_classes=9, but synthetic:8x8x1x40 has 10 classes"):
        build(tmp_path, "synthetic:8x8x1x40", num_classes=9)


def test_a_constant_channel_does_not_divide_by_zero(tmp_path) -> None:
    source = make_folder(tmp_path / "set", [(8, 8)] * 2)
    for path in (tmp_path / "set").rglob("*.png"):
        Image.new("RGB", (8, 8), (255, 0, 51)).save(path)
    data = build(tmp_path, source)
    assert data.mean == (1.0, 0.0, pytest.approx(0.2)) and data.std == (1.0, 1.0, 1.0)


@needs_cifar
def test_real_photographs(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    data = build(tmp_path, f"hf:{CIFAR10}")
    assert data.val is not None and data.image_shape == (3, 32, 32)
    assert torch.bincount(data.val.labels).tolist() == [500] * 10 and len(data.test) == 10000
    assert np.allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=2e-3)  # the published statistics of CIFAR-10
    assert np.allclose(data.std, (0.247, 0.243, 0.261), atol=3e-3)
    loaded = data.val.load(17)
    assert loaded is not None
    assert np.array_equal(loaded.numpy(), np.asarray(data.val.split.read(int(data.val.rows[17]))))


def test_an_animation_is_its_first_frame(tmp_path) -> None:
    source = make_folder(tmp_path / "set", [(8, 8)] * 3)
    place = tmp_path / "set" / "train" / "cat" / "0.png"
    frames = [Image.new("RGB", (8, 8), (60 * number, 0, 0)) for number in range(1, 4)]
    frames[0].save(place, format="PNG", save_all=True, append_images=frames[1:])
    with Image.open(place) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert build(tmp_path, source, memory_budget=0.0).train.load(0)[0, 0].tolist() == [60, 0, 0]


def test_one_grey_image_does_not_make_a_set_grey(tmp_path) -> None:
    source = make_folder(tmp_path / "set", [(8, 8)] * 5)
    first = tmp_path / "set" / "train" / "cat" / "0.png"
    with Image.open(first) as image:
        grey = image.convert("L")
    grey.save(first)
    assert build(tmp_path, source).image_shape == (3, 8, 8)
