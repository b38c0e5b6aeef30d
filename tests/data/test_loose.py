"""Images without labels, of every kind."""

from pathlib import Path

import numpy as np
import pytest
from odd_images import BROKEN, write_odd_images
from PIL import Image

from lockstep.data.loose import find_files, load_files
from lockstep.errors import UserError


@pytest.mark.parametrize(("shape", "resize_size"), [((3, 8, 8), None), ((1, 8, 8), 9), ((3, 32, 24), 32)])
def test_odd_files_are_images_or_one_line_each(
    tmp_path: Path, shape: tuple[int, int, int], resize_size: int | None
) -> None:
    good = write_odd_images(tmp_path / "odd")
    batches = list(load_files(tmp_path / "odd", shape, resize_size, 10))
    assert [len(batch) for batch in batches] == [10, 10, 4]
    found = {image.name: image for batch in batches for image in batch}
    assert {name for name, image in found.items() if image.pixels is not None} == good
    assert found.keys() - good == BROKEN
    for name in good:
        pixels = found[name].pixels
        assert pixels is not None and pixels.dtype == np.uint8 and pixels.shape == (*shape[1:], shape[0])
    for name in BROKEN:
        problem = found[name].problem
        assert name in problem and "\n" not in problem and "on_error" not in problem


def test_pixels_are_those_of_evaluation(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 8, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    ((same,),) = load_files(tmp_path / "a.png", (3, 10, 8), None, 5)
    assert same.name == "a.png" and np.array_equal(same.pixels, np.asarray(image))
    ((cut,),) = load_files(tmp_path / "a.png", (3, 6, 6), 8, 5)
    assert np.array_equal(cut.pixels, np.asarray(image)[2:8, 1:7])
    ((brought,),) = load_files(tmp_path, (3, 4, 4), None, 5)
    resized = np.asarray(image.resize((4, 5), Image.Resampling.BILINEAR))
    assert np.array_equal(brought.pixels, resized[:4])


def test_nothing_to_look_at_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        find_files(tmp_path / "nowhere")
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UserError, match="the folder holds no files"):
        find_files(tmp_path)
