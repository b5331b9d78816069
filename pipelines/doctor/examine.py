"""Look at every image once: size, mode, turn, brightness, a digest of its bytes and a perceptual hash."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.common.progress import counted
from pipelines.common.threads import in_threads
from pipelines.config import DataConfig
from pipelines.exif import orientation
from pipelines.library_warnings import collected_warnings
from pipelines.pixels import BadImageError, damage_told, decode, to_rgb
from pipelines.prepare.sources import Images

SIDE = 8  # pixels of the small copy that is compared where hashes are near


@dataclass(frozen=True)
class Look:
    """What was seen of one image.

    Attributes:
        digest: Of the file, 16 bytes.
        hash: Perceptual hash (pHash), 64 bits.
        small: uint8 (8, 8, 3), the image shrunk.
        width: Pixels, as it is stored.
        height: Pixels, as it is stored.
        mode: Pillow's name of the pixels, such as RGB, L, CMYK.
        orientation: Of EXIF; 1 is upright.
        mean: Of all values, 0 to 255.
        spread: Standard deviation of the values of a channel, the mean of the three.
        size: Bytes of the file.
    """

    digest: bytes
    hash: int
    small: np.ndarray
    width: int
    height: int
    mode: str
    orientation: int
    mean: float
    spread: float
    size: int


@dataclass(frozen=True)
class Examined:
    """What was seen of all images, an entry an image.

    Attributes:
        split: Name of each image's split.
        index: Its number in the split.
        name: As the source has it.
        label: int64 (N,).
        group: int64 (N,), or None.
        look: What was seen, or why it cannot be read.
        classes: Names in label order.
        splits: The images by split.
    """

    split: list[str]
    index: list[int]
    name: list[str]
    label: np.ndarray
    group: np.ndarray | None
    look: list[Look | BadImageError]
    classes: list[str]
    splits: Mapping[str, Images]

    def place(self, number: int) -> str:
        """Where an image is."""
        return self.splits[self.split[number]].place(self.index[number], self.split[number])

    def image(self, number: int, data: DataConfig) -> Image.Image:
        """The picture of one image, as RGB.

        Raises:
            BadImageError: It cannot be read.
        """
        source = self.splits[self.split[number]].read(self.index[number])
        with damage_told(source):
            return to_rgb(decode(source, max_pixels=data.max_pixels, max_scans=None), data.window)


def examine(classes: list[str], splits: Mapping[str, Images], data: DataConfig) -> Examined:
    """Read every image of a source.

    Args:
        classes: Names in label order.
        splits: The images by split.
        data: Limits for large images, and the window of deep ones.

    Returns:
        What was seen.

    Raises:
        UserError: The package imagehash is not installed.
    """
    look: list[Look | BadImageError] = []
    for split, images in splits.items():
        look += counted(_looks(images, data), len(images), f"doctor: {split}")
    groups = [images.groups for images in splits.values() if images.groups is not None]
    return Examined(
        [split for split, images in splits.items() for _ in range(len(images))],
        [index for images in splits.values() for index in range(len(images))],
        [name for images in splits.values() for name in images.names],
        np.concatenate([images.labels for images in splits.values()]),
        np.concatenate(groups) if len(groups) == len(splits) else None,
        look,
        classes,
        splits,
    )


def _looks(images: Images, data: DataConfig) -> Iterator[Look | BadImageError]:
    """The images in order, decoded in threads, a bounded number ahead."""
    try:
        import imagehash
    except ImportError as error:
        raise UserError("pipelines.doctor needs the package ImageHash: pip install 'cibl-ray[data]'") from error

    with collected_warnings() as warned:

        def work(index: int) -> Look | BadImageError:
            warned.begin(images.place(index, "image"))
            try:
                source = images.read(index)
                with damage_told(source):
                    image = decode(source, max_pixels=data.max_pixels, max_scans=None)
                    turn, mode, (width, height) = orientation(image), image.mode, image.size
                    rgb = to_rgb(image, data.window)
            except BadImageError as error:
                return error
            except OSError as error:
                return BadImageError(str(error.strerror or error))
            rgb.thumbnail((128, 128), Image.Resampling.BILINEAR, reducing_gap=2.0)  # enough for hashes, and fast
            pixels = np.asarray(rgb)
            bits = imagehash.phash(rgb).hash.flatten()
            return Look(
                digest=hashlib.sha256(source if isinstance(source, bytes) else source.tobytes()).digest()[:16],
                hash=int.from_bytes(np.packbits(bits).tobytes(), "big"),
                small=np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BOX)),
                width=width,
                height=height,
                mode=mode,
                orientation=turn,
                mean=float(pixels.mean()),
                spread=float(pixels.std((0, 1)).mean()),
                size=len(source) if isinstance(source, bytes) else source.nbytes,
            )

        with contextlib.closing(in_threads(work, range(len(images)))) as looks:
            yield from looks
    if warned.text():
        print(f"doctor: {warned.text()}", file=sys.stderr)
