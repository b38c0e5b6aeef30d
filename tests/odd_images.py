"""Image files as people have them: 24 of every kind, of which 8 are none, or broken."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = {
    "broken link.png",
    "empty.png",
    "float.tiff",
    "pipe.png",
    "postscript.jpg",
    "text.jpg",
    "truncated.jpg",
    "vectors.svg",
}


def write_odd_images(root: Path) -> set[str]:
    """Write them into a new folder; returns the names of those that are good, below it."""
    (root / "nested" / "deep er").mkdir(parents=True)
    random = np.random.default_rng(0)
    plain = Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x112] = 6  # a camera held sideways
    plain.save(root / "plain.jpg")
    plain.convert("CMYK").save(root / "cmyk.jpg")
    plain.convert("P").save(root / "palette.gif")
    plain.convert("P").save(root / "palette transparency.png", transparency=0)
    plain.save(root / "rotated.jpg", exif=turned)
    plain.convert("RGBA").save(root / "transparent.png")
    plain.convert("LA").save(root / "grey alpha.png")
    plain.convert("1").save(root / "bilevel.png")
    plain.convert("YCbCr").save(root / "ycbcr.tiff")
    plain.save(root / "animated.gif", save_all=True, append_images=[plain.rotate(180)])
    plain.save(root / "nested" / "deep er" / "ünï\ncode $x.webp")
    Image.fromarray(random.integers(0, 65536, (30, 30)).astype(np.uint16)).save(root / "grey16.png")
    Image.new("RGB", (1, 1)).save(root / "one pixel.png")
    Image.new("L", (3000, 2)).save(root / "wide.png")
    encoded = (root / "plain.jpg").read_bytes()
    (root / "no extension").write_bytes(encoded)
    (root / "a photograph.png").write_bytes(encoded)  # which is a JPEG
    good = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    Image.fromarray(random.random((20, 20)).astype(np.float32)).save(root / "float.tiff")
    (root / "truncated.jpg").write_bytes(encoded[: len(encoded) // 2])
    (root / "text.jpg").write_text("this is no image")
    (root / "empty.png").write_bytes(b"")
    (root / "vectors.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (root / "postscript.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (root / "broken link.png").symlink_to("nowhere")
    os.mkfifo(root / "pipe.png")
    (root / ".hidden").write_text("no file that anybody means")
    return good
