"""Images a second that one core decodes, crops at random and resizes, from JPEG files: ours beside other ways.

    python benchmarks/decode.py                                     # 500x375 files, crops to 224: a minute
    python benchmarks/decode.py --width 4000 --height 3000 --files 4 --images 4

The files are made here: noise of all scales, coarse ones stronger, as in photographs; about 100 kB of 500x375 pixels at
quality 90. All ways read them from disk (that is, from the page cache), cut boxes of torchvision's RandomResizedCrop,
and end with uint8 pixels in a tensor, on one thread. In turns, CPU seconds; medians over repeats, and of the ratios to
the best way within each repeat. docs/performance.md has some.
"""

import argparse
import io
import json
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms import PILToTensor, RandomResizedCrop, v2

from lockstep.augment.geometry import crop_draws, pixel_box
from lockstep.data.images import ImageSet
from lockstep.data.loader import read_samples
from lockstep.data.sources.folder import open_folder
from lockstep.launch.machine import cpu_model
from lockstep.randomness import sample_keys
from lockstep.settings.config import DataConfig

MIN_AREA = 0.08
OCTAVES, FALL = 9, 0.86
"""Of the noise, each twice as fine and so much weaker than the one before"""


def photograph(width: int, height: int, number: int) -> bytes:
    """A JPEG file that is as hard to decode as a photograph."""
    noise = np.random.default_rng(number)
    pixels = np.zeros((height, width, 3))
    for octave in range(OCTAVES):
        grid = noise.normal(size=(2 + (height << octave) // 256, 2 + (width << octave) // 256, 3)).astype(np.float32)
        grid = 0.9 * grid.mean(2, keepdims=True) + 0.3 * grid
        channels = [Image.fromarray(channel).resize((width, height)) for channel in np.moveaxis(grid, 2, 0)]
        pixels += FALL**octave * np.stack(list(map(np.asarray, channels)), 2)
    pixels = 120 + 55 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def ways(data: ImageSet, size: int) -> dict[str, Callable[[list[int]], list[Tensor]]]:
    """Each makes images uint8 (3, H, W) or (H, W, 3) of the samples at these indices."""
    paths = [Path(data.split.where(row)) for row in range(len(data))]
    usual = v2.Compose([RandomResizedCrop(size, (MIN_AREA, 1.0)), PILToTensor()])
    lightest = v2.RandomResizedCrop(size, (MIN_AREA, 1.0), antialias=True)

    def ours(samples: list[int]) -> list[Tensor]:
        keys = sample_keys(
            0, random.getrandbits(30), torch.tensor(samples), torch.zeros(len(samples), dtype=torch.int64)
        )
        return [image for image, _ in read_samples(data, samples, keys, MIN_AREA)]

    def pillow(index: int) -> Tensor:
        image = Image.open(paths[index])
        left, top, width, height = pixel_box(draws(), MIN_AREA, *image.size)
        box = (left, top, left + width, top + height)
        return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box)))

    def torchvisions_usual(index: int) -> Tensor:
        return usual(Image.open(paths[index]).convert("RGB"))

    def torchvisions_lightest(index: int) -> Tensor:
        return lightest(decode_jpeg(torch.frombuffer(bytearray(paths[index].read_bytes()), dtype=torch.uint8)))

    def best_parts(index: int) -> Tensor:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(paths[index].read_bytes()))
        left, top, width, height = pixel_box(draws(), MIN_AREA, pixels.shape[1], pixels.shape[0])
        cut = pixels[top : top + height, left : left + width][None].permute(0, 3, 1, 2)
        return F.interpolate(cut, size=(size, size), mode="bilinear", antialias=True)[0]

    rows = crop_draws(torch.arange(1000)).tolist()

    def draws() -> list[float]:
        return random.choice(rows)

    alone = {
        "Pillow": pillow,
        "torchvision, as usual": torchvisions_usual,
        "torchvision's decoder, its v2 on uint8": torchvisions_lightest,
        "the quickest parts by hand": best_parts,
    }
    return {name: _each(way) for name, way in alone.items()} | {"ours": ours}


def _each(way: Callable[[int], Tensor]) -> Callable[[list[int]], list[Tensor]]:
    return lambda samples: [way(index) for index in samples]


def image_set(folder: Path, size: int) -> ImageSet:
    """The files as a streamed training set."""
    split = open_folder(str(folder), DataConfig(source=f"folder:{folder}")).splits["train"]
    labels = torch.from_numpy(split.labels)
    return ImageSet(split, torch.arange(len(split)), labels, None, (3, size, size), size, "raise")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """CPU seconds for an image, of each way and repeat."""
    sizes = []
    for number in range(options.files):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        sizes.append(path.write_bytes(photograph(options.width, options.height, number)))
    print(f"{cpu_model()}; {options.width}x{options.height}, {statistics.mean(sizes) / 1000:.0f} kB each; one core")
    data = image_set(folder, options.size)
    contenders = ways(data, options.size)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    samples = [number % options.files for number in range(options.images)]
    for repeat in range(1 + options.repeats):
        names = list(contenders)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:  # each comes first as often
            random.seed(repeat)
            begun = time.process_time()
            images = contenders[name](samples)
            if repeat:  # the first one warms up
                seconds[name].append((time.process_time() - begun) / len(samples))
            assert all(image.dtype == torch.uint8 and image.numel() == 3 * options.size**2 for image in images)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--size", type=int, default=224, help="of the crops")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--images", type=int, default=48, help="decoded in a turn")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's decoders are to go
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(options, Path(folder))
    best = min(seconds, key=lambda name: statistics.median(seconds[name]) if name != "ours" else math.inf)
    results = {}
    for name, own in seconds.items():
        shares = [theirs / mine for mine, theirs in zip(own, seconds[best], strict=True)]
        results[name] = {"images_per_second": 1 / statistics.median(own), "of_the_best": statistics.median(shares)}
        speed, share = results[name].values()
        print(f"{name:<40} {speed:7.0f} images/s   {share:.2f} of the best other way", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
