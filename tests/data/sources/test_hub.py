"""`hf:<hub name or local folder>`."""

from dataclasses import replace

import numpy as np
import pytest
from programs import CIFAR10
from sources import hub_folder, open_named, png

from lockstep.data.sources.kinds import open_source
from lockstep.errors import UserError
from lockstep.settings.config import DataConfig

needs_cifar = pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"{CIFAR10} is absent")


@pytest.fixture(autouse=True)
def _hub_cache(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@needs_cifar
def test_hub_folder_has_labels_names_and_images() -> None:
    source = open_named(f"hf:{CIFAR10}")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 50000, "test": 10000}
    assert source.classes[5] == "dog"
    train = source.splits["train"]
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert train.read(3).size == (32, 32)
    assert train.where(3).endswith("train row 3 (dog_3814.jpg)") and train.labels[3] == 5


def test_hub_integer_labels_validation_split_and_unlabelled_test(tmp_path) -> None:
    rows = {
        "train": [(png(1), 0), (png(2), 1), (png(3), 2)],
        "validation": [(png(4), 2)],
        "test": [(png(5), -1), (png(6), -1)],
    }
    source = open_named(hub_folder(tmp_path / "set", rows))
    assert source.classes == ("0", "1", "2")
    assert np.asarray(source.splits["val"].read(0))[0, 0] == 4
    assert source.splits["test"] is source.splits["val"]  # its test labels are hidden: -1 throughout


def test_hub_without_test_split_holds_out_a_fifth(tmp_path) -> None:
    source = open_named(hub_folder(tmp_path / "set", {"train": [(png(row), row % 2) for row in range(20)]}))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 16, "test": 4}


@pytest.mark.parametrize(
    ("rows", "label", "message"),
    [
        ([(png(1), 0), (png(2), None)], "label", r"train row 1 \(1.png\): the label is missing"),
        ([(png(1), 0), (png(2), 1), (png(2), -3)], "label", r"train row 2 \(2.png\): label -3 lies outside 0..1"),
        ([(png(1), 0), (png(2), 1)], "kind", "no column of type label .* its columns are image, kind"),
        ([(png(1), 1), (png(2), 1)], "label", "only one class has training images"),
    ],
)
def test_hub_bad_rows_are_named(tmp_path, rows, label, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_named(hub_folder(tmp_path / "set", {"train": rows, "test": rows}, label))


def test_columns_can_be_named(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    images = {name: [{"bytes": png(row + shift), "path": None} for row in range(4)]
              for name, shift in (("front", 0), ("back", 100))}  # fmt: skip
    table = pa.table({**images, "label": [0, 1, 0, 1], "breed": [0, 1, 2, 2], "name": list("abcd")})
    pq.write_table(table, tmp_path / "set" / "train-00000-of-00001.parquet")
    base = DataConfig(source=f"hf:{tmp_path}/set", test_fraction=0.0)
    usual = open_source(base)
    other = open_source(replace(base, image_column="back", label_column="breed"))
    assert usual.splits["train"].labels.tolist() == [0, 1, 0, 1]
    assert other.splits["train"].labels.tolist() == [0, 1, 2, 2]
    assert np.asarray(usual.splits["train"].read(1))[0, 0] == 1
    assert np.asarray(other.splits["train"].read(1))[0, 0] == 101
    back = open_source(replace(base, image_column="back"))
    assert back.fingerprint != usual.fingerprint, "decoded images are kept under it"
    for wrong, message in [
        ({"image_column": "bakc"}, "--data.image_column=bakc: .* has the columns front, back, label, breed, name"),
        ({"image_column": "breed"}, "--data.image_column=breed of .* holds no images"),
        ({"label_column": "name"}, "column 'name' holds string, not integer labels"),
        ({"label_column": "kind"}, "--data.label_column=kind: .* has the columns"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(replace(base, **wrong))


def test_hub_truncated_file_is_one_line(tmp_path) -> None:
    source = hub_folder(tmp_path / "set", {"train": [(png(row), row % 2) for row in range(20)]})
    file = next((tmp_path / "set").iterdir())
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be loaded .*: check or remove its files") as caught:
        open_named(source)
    assert "\n" not in str(caught.value)


def test_hub_name_without_network_is_one_line(monkeypatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # the library's own switch spares 20 s of retries
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be loaded .*check the name and the network") as caught:
        open_named("hf:nobody/nothing-of-this-name")
    assert "\n" not in str(caught.value)
