"""`tar:<folder of shards>`."""

import gzip
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sources import image_folder, open_named, png, tar_of_folder, write_shard

from lockstep.data.cache import ImageCache
from lockstep.data.decoding import UnreadableImage, open_image
from lockstep.data.sources import tar as tar_source
from lockstep.data.sources.kinds import open_source
from lockstep.data.sources.source import Source
from lockstep.errors import UserError
from lockstep.settings.config import DataConfig

FOUR = [("a.png", png(1)), ("a.cls", "0"), ("b.png", png(2)), ("b.cls", "1"),
        ("c.png", png(3)), ("c.cls", "0"), ("d.png", png(4)), ("d.cls", "1")]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(source=f"tar:{tmp_path}/set", cache_dir=str(tmp_path / "cache"), test_fraction=0.0)


def greys(source: Source, split: str = "train") -> list[int]:
    images = source.splits[split]
    return [int(np.asarray(images.read(row))[0, 0]) for row in range(len(images))]


def test_shards_are_the_images_of_a_folder_in_the_same_order(tmp_path: Path, config: DataConfig) -> None:
    images = open_named(image_folder(tmp_path / "images", ("train", "val", "test")))
    name = tar_of_folder(tmp_path / "images", tmp_path / "set", ("train", "val", "test"))
    shards = open_source(replace(config, source=name))
    assert shards.classes == images.classes == ("cat", "dog")
    assert list(shards.splits) == ["train", "val", "test"]
    for split, theirs in images.splits.items():
        ours = shards.splits[split]
        assert ours.labels.dtype == np.int64 and ours.labels.tolist() == theirs.labels.tolist()
        for row in (9, 0, 4, 3):
            assert np.array_equal(np.asarray(ours.read(row)), np.asarray(theirs.read(row)))
    assert shards.splits["test"].where(9) == f"{tmp_path}/set/test-000001.tar: 001_4.png"


def test_the_headers_are_read_once(tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "set/train-0.tar"
    write_shard(shard, FOUR)
    first = open_source(config)
    monkeypatch.setattr("tarfile.open", lambda *_: pytest.fail("a shard was read again"))
    again = open_source(config)
    assert greys(again) == greys(first) == [1, 2, 3, 4]
    assert (again.identity, again.fingerprint) == (first.identity, first.fingerprint)
    monkeypatch.undo()

    (kept,) = (tmp_path / "cache").glob("shards-*.npz")
    kept.write_bytes(kept.read_bytes().replace(b"b.png", b"B.png"))
    assert open_source(config).splits["train"].where(1).endswith("b.png"), "a damaged index is made again"
    write_shard(shard, [*FOUR, ("e.png", png(5)), ("e.cls", "1")])
    changed = open_source(config)
    assert greys(changed) == [1, 2, 3, 4, 5], "so is that of other shards"
    assert changed.fingerprint != first.fingerprint and changed.identity != first.identity
    assert not list((tmp_path / "cache").glob("*.lock*"))


def test_shards_elsewhere_are_the_same_data_and_other_pictures_are_not(tmp_path: Path, config: DataConfig) -> None:
    def identity(place: str, shade: int, label: str = "1") -> dict[str, int | str]:
        write_shard(
            tmp_path / place / "0.tar", [*FOUR[:6], ("d.ppm", b"P5 1 1 255 " + bytes([shade])), ("d.cls", label)]
        )
        return open_source(replace(config, source=f"tar:{tmp_path}/{place}")).identity

    before = identity("here", 4)
    assert identity("there", 4) == before
    assert identity("here", 5) != before
    assert identity("here", 4, "0") != before


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(tmp_path / "set/0.tar", FOUR)
    (tmp_path / "file").touch()
    assert greys(open_source(replace(config, cache_dir=str(tmp_path / "file" / "cache")))) == [1, 2, 3, 4]
    assert "the index of the shards cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("set", {"train": [1, 2, 3, 4, 1, 2, 3, 4], "test": [1, 2, 3, 4]}),
        ("set/train-{00..01}.tar", {"train": [1, 2, 3, 4, 1, 2, 3, 4]}),
        ("set/train-{1..00}.tar", {"train": [1, 2, 3, 4, 1, 2, 3, 4]}),
        ("set/{train,test}-00.tar", {"train": [1, 2, 3, 4], "test": [1, 2, 3, 4]}),
        ("set/train-*1.tar", {"train": [1, 2, 3, 4]}),
        ("set/test-00.tar", None),
        ("folders", {"train": [1, 2, 3, 4], "val": [1, 2, 3, 4]}),
    ],
)
def test_splits_are_words_in_names(
    name: str, expected: dict[str, list[int]] | None, tmp_path: Path, config: DataConfig
):
    for path in ("set/train-00", "set/train-01", "set/test-00", "folders/training/000", "folders/validation/000"):
        write_shard(tmp_path / f"{path}.tar", FOUR)
    if expected is None:
        with pytest.raises(UserError, match="holds shards for test, and none for train"):
            open_source(replace(config, source=f"tar:{tmp_path}/{name}"))
        return
    source = open_source(replace(config, source=f"tar:{tmp_path}/{name}"))
    own = {split: greys(source, split) for split in source.splits if split in expected}
    assert own == expected and set(source.splits) <= {*expected, "test"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{9..11}", ["9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{00..100}", [f"{number:03d}" for number in range(101)]),
        ("{2..1}{a,b}", ["2a", "2b", "1a", "1b"]),
    ],
)
def test_braces_mean_what_they_mean_to_bash(pattern: str, expected: list[str]) -> None:
    assert tar_source._written_out(pattern) == expected


def test_labels_and_images_by_other_names(tmp_path: Path, config: DataConfig) -> None:
    files = []
    for row, breed in enumerate(("pug", "akita", "pug", "beagle")):
        files += [(f"x/{row}.json", f'{{"label": {row % 2}, "breed": "{breed}"}}'), (f"x/{row}.txt", f" {breed}\n")]
        files += [(f"x/{row}.JPG", png(row)), (f"x/{row}.seg.png", png(row + 100)), (f"x/._{row}.JPG", b"")]
    write_shard(tmp_path / "set/0.tar", [*files, ("notes.md", "no sample")])
    usual = open_source(config)
    assert usual.splits["train"].labels.tolist() == [0, 1, 0, 1] and usual.classes == ("0", "1")
    assert greys(usual) == [0, 1, 2, 3]
    for column in ("breed", "txt"):
        named = open_source(replace(config, label_column=column, image_column="seg.png"))
        assert named.classes == ("akita", "beagle", "pug") and named.splits["train"].labels.tolist() == [2, 0, 2, 1]
        assert greys(named) == [100, 101, 102, 103] and named.fingerprint != usual.fingerprint
    (tmp_path / "set/classes.txt").write_text("pug\nbeagle\nakita\n")
    assert open_source(replace(config, label_column="breed")).splits["train"].labels.tolist() == [0, 2, 0, 1]
    assert open_source(replace(config, label_column="label")).classes == ("pug", "beagle", "akita")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*FOUR, ("e.png", png(5))], r"0.tar: e.png has no label: it takes a file e.cls, or a .json with 'label'"),
        ([*FOUR, ("e.png", png(5)), ("e.cls", " ")], r"0.tar: e.png has no label"),
        ([*FOUR, ("e.png", png(5)), ("e.json", '{"label": 1.5}')], r"0.tar: e.png has no label"),
        ([*FOUR, ("e.png", png(5)), ("e.json", '{"label"')], r"0.tar: e.json cannot be read"),
        ([*FOUR, ("e.png", png(5)), ("e.json", r'{"label": "\ud800"}')], r"0.tar: e.json cannot be read"),
        ([*FOUR, ("e.png", png(5)), ("e.cls", b"\xff")], r"0.tar: e.cls cannot be read"),
        ([*FOUR, ("e.png", png(5)), ("e.cls", "-1")], r"0.tar: e.png: label -1 lies outside 0..1"),
        ([*FOUR, ("e.png", png(5)), ("e.cls", "99")], r"label 99 of 5 images: name all classes in classes.txt"),
        ([*FOUR, ("e.png", png(5)), ("e.cls", "a\nb")], r"0.tar: e.png: label 'a\\nb' is no class of train"),
        ([*FOUR, ("e.png", png(5)), ("e.cls", "x" * 1001)], r"0.tar: e.png has a label of more than 1000 bytes"),
        ([*FOUR, ("a.png", png(5))], r"0.tar: a.png is there twice"),
        ([*FOUR, ("a.jpg", png(5))], r"a.png and a.jpg are one sample: set --data.image_column"),
        (
            [*FOUR, ("cat.7.png", png(5)), ("cat.7.cls", "0")],
            r"0.tar: cat.7.png: a sample's name ends at the first dot",
        ),
        ([], r"the train split is empty"),
    ],
)
def test_samples_that_are_not_as_they_should_be_are_named(
    files: list[tuple[str, bytes | str]], message: str, tmp_path: Path, config: DataConfig
) -> None:
    write_shard(tmp_path / "set/0.tar", files)
    with pytest.raises(UserError, match=message) as caught:
        open_source(config)
    assert "\n" not in str(caught.value)


def test_a_class_that_training_does_not_have_is_named(tmp_path: Path, config: DataConfig) -> None:
    words = [(name, {"0": "cat", "1": "dog"}.get(str(content), content)) for name, content in FOUR]
    write_shard(tmp_path / "set/train.tar", words)
    write_shard(tmp_path / "set/val.tar", [*words, ("e.png", png(5)), ("e.cls", "fox")])
    with pytest.raises(UserError, match=r"val.tar: e.png: label 'fox' is no class of train"):
        open_source(config)
    (tmp_path / "set/classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(UserError, match=r"classes.txt must have the name of a class in every line, each once"):
        open_source(config)


@pytest.mark.parametrize("kept", [0, 300, 512, 1024 + 3, 1536, 4 * 1024, 4 * 1024 + 512])
def test_a_shard_that_was_cut_off_is_named(kept: int, tmp_path: Path, config: DataConfig) -> None:
    """Also between two files, where tarfile itself sees the end and says nothing."""
    shard = tmp_path / "set/0.tar"
    write_shard(shard, FOUR)
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"0.tar is damaged, or no uncompressed tar file \(.*\): write it again"):
        open_source(config)


def test_a_damaged_header_is_named(tmp_path: Path, config: DataConfig) -> None:
    shard = tmp_path / "set/0.tar"
    write_shard(shard, FOUR)
    content = bytearray(shard.read_bytes())
    content[content.index(b"c.png")] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"0.tar is damaged"):
        open_source(config)


def test_folders_of_something_else_are_named(tmp_path: Path, config: DataConfig) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"set holds no .tar files"):
        open_source(config)
    with pytest.raises(UserError, match=r"there is no /.*/set/train-2.tar"):
        open_source(replace(config, source=f"tar:{tmp_path}/set/train-{{2..3}}.tar"))
    write_shard(tmp_path / "set/0.tar", FOUR)
    whole = (tmp_path / "set/0.tar").read_bytes()
    (tmp_path / "set/1.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"1.tar is damaged, or no uncompressed tar file"):
        open_source(config)
    (tmp_path / "set/1.tar").rename(tmp_path / "set/1.tar.gz")
    with pytest.raises(UserError, match=r"1.tar.gz is compressed, and its images cannot be reached at random: unpack"):
        open_source(config)
    (tmp_path / "set/1.tar.gz").unlink()
    write_shard(tmp_path / "set/train-test.tar", FOUR)
    with pytest.raises(UserError, match=r"train-test.tar names several splits, train and test"):
        open_source(config)
    (tmp_path / "set/train-test.tar").rename(tmp_path / "set/test.tar")
    with pytest.raises(UserError, match=r"0.tar is of no split, as others are"):
        open_source(config)


def test_links_in_a_shard_are_named(tmp_path: Path, config: DataConfig) -> None:
    import tarfile

    write_shard(tmp_path / "set/0.tar", FOUR)
    with tarfile.open(tmp_path / "set/0.tar", "a") as archive:
        link = tarfile.TarInfo("e.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"0.tar: e.png is a link or no plain file: write shards with tar's --deref"):
        open_source(config)


def test_images_that_are_missing_or_broken_can_be_skipped(tmp_path: Path, config: DataConfig) -> None:
    broken = [("e.cls", "1"), ("f.png", png(5)[:30]), ("f.cls", "0")]
    write_shard(tmp_path / "set/0.tar", [*FOUR, *broken])
    source = open_source(config)
    train = source.splits["train"]
    with pytest.raises(UnreadableImage, match=r"0.tar: e.cls cannot be decoded \(the image is missing\)"):
        open_image(train, 4)
    _, skipped = ImageCache(train, (4, 4, 1), None, "skip", source.fingerprint, tmp_path / "cache").images()
    assert skipped.tolist() == [False] * 4 + [True] * 2


def test_a_shard_that_goes_while_it_is_read_is_no_broken_image(tmp_path: Path, config: DataConfig) -> None:
    """Which would be skipped."""
    shard = tmp_path / "set/0.tar"
    write_shard(shard, FOUR)
    train = open_source(config).splits["train"]
    os.truncate(shard, 1024)
    with pytest.raises(UserError, match=r"0.tar: d.png cannot be decoded \(its shard has become shorter\)") as caught:
        open_image(train, 3)
    assert type(caught.value) is UserError
    write_shard(shard, [("a.png", png(9)), *FOUR[1:]])
    with pytest.raises(UserError, match=r"0.tar: d.png cannot be decoded \(its shard was changed since the") as caught:
        open_image(pickle.loads(pickle.dumps(train)), 3)
    assert type(caught.value) is UserError
    shard.unlink()
    with pytest.raises(UserError, match=r"0.tar: d.png cannot be decoded \(its shard is gone\)") as caught:
        open_image(pickle.loads(pickle.dumps(train)), 3)
    assert type(caught.value) is UserError


def test_few_shards_are_open_at_a_time(tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_shard(tmp_path / f"set/{number:02d}.tar", FOUR)
    monkeypatch.setattr(tar_source, "_MOST_OPEN", 3)
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(config)
    assert greys(source) == [1, 2, 3, 4] * 12
    assert len(os.listdir("/proc/self/fd")) <= before + 3
