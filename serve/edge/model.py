"""One model in this process, and the images that it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cibl_ray.bundle.card import PROBABILITIES
from pipelines import jpeg
from pipelines.common.errors import UserError
from pipelines.formats import readable_suffixes
from pipelines.image_files import LeftOut, image_files
from pipelines.pixels import MAX_PIXELS
from serve.decode import Limits, named, pixels, top

_CHUNK = 1 << 20
_HEAD = 18  # bytes of a file by which its format is known
_WHOLE = 1 << 30  # bytes of an image on standard input


class Edge:
    """A downloaded model.

    Attributes:
        runtime: The onnxruntime session.
        card: What the file says of itself.
    """

    def __init__(
        self, model: Path, threads: int | None = None, max_pixels: int = MAX_PIXELS, precision: str | None = None
    ) -> None:
        """Load the model.

        Args:
            model: The ONNX file.
            threads: Threads of onnxruntime; None: all cores.
            max_pixels: Of an image; larger ones are refused.
            precision: Which the file must have; None: any.

        Raises:
            UserError: It cannot be loaded, or has another precision.
        """
        from cibl_ray.bundle.runtime import Runtime  # here, so that a missing onnxruntime is one line

        self.runtime = Runtime(model, "auto", threads)
        self.card = self.runtime.card
        if precision not in (None, self.card.precision):
            raise UserError(f"{str(model)!r} is {self.card.precision}, not {precision}; give another file, or no precision")
        self._limits = Limits(max_pixels, formats=None, max_scans=None)  # as training reads: the files are the user's own

    def classify(self, data: bytes, k: int = 1, tail_shift: float = 0.0) -> list[dict[str, Any]]:
        """Classify an image file.

        Args:
            data: The file.
            k: How many classes.
            tail_shift: More of it favours rare classes.

        Returns:
            The k most likely classes: label, probability, group, index.

        Raises:
            BadImageError: It is no image, damaged, or too large.
        """
        image = self.pixels(data)
        shift = np.array([tail_shift], np.float32) if tail_shift else None
        (probabilities,) = self.runtime(image[None], shift, (PROBABILITIES,))
        return top(self.card, probabilities[0], k)

    def pixels(self, data: bytes) -> np.ndarray:
        """Decode an image file by the model's rule.

        Args:
            data: The file.

        Returns:
            uint8 (S, S, 3).

        Raises:
            BadImageError: As in `classify`.
        """
        return pixels(data, self.card.rule, self._limits)


def listed(names: list[str], tell: Callable[[str], None]) -> list[str]:
    """Find all images that are named.

    Args:
        names: Files, folders, or '-' for standard input.
        tell: Called with one line for each folder without an image, and for the files of a folder that are left out. A line
            that begins with 'error: ' counts as a failure.

    Returns:
        Files, whether they can be read or not, and '-' where it was named.
    """
    places: list[str] = []
    for name in names:
        places += _of_folder(name, tell) if name != "-" and Path(name).is_dir() else [name]
    return places


def images(places: Iterable[str], stdin: BinaryIO, tell: Callable[[str], None]) -> Iterator[tuple[str, bytes]]:
    """Read images.

    Args:
        places: From `listed`.
        stdin: Standard input: JPEG images one after another, or one image of another format.
        tell: As in `listed`, for each file that cannot be read and for standard input without an image.

    Yields:
        The image's place, and its bytes.
    """
    for place in places:
        if place == "-":
            number = 0
            for number, frame in enumerate(frames(stdin, tell), 1):
                yield f"frame {number - 1}", frame
            if not number:
                tell("error: -: standard input has no image; give JPEG images, or one image of another format")
        else:
            yield from _of_file(Path(place), tell)


def _of_folder(name: str, tell: Callable[[str], None]) -> list[str]:
    left_out = LeftOut()
    try:
        found = image_files(Path(name), left_out)
    except UserError as error:
        tell(f"error: {error}")
        return []
    for line in left_out.lines(Path(name)):
        tell(line)
    if not found:
        tell(f"error: {name}: no image in this folder; endings that are read: {' '.join(readable_suffixes())}")
    return [str(Path(name, path)) for path in found]


def _of_file(path: Path, tell: Callable[[str], None]) -> Iterator[tuple[str, bytes]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        tell(f"error: {path}: {error.strerror}")
        return
    yield str(path), data


def frames(stream: BinaryIO, tell: Callable[[str], None]) -> Iterator[bytes]:
    """Cut a stream into its images.

    Args:
        stream: JPEG images one after another, with or without other bytes between (MJPEG); or one image of another format.
        tell: As in `listed`, for each JPEG image that is too large.

    Yields:
        Each image file.
    """
    read = getattr(stream, "read1", stream.read)
    buffer = bytearray()
    while len(buffer) < _HEAD and (chunk := read(_CHUNK)):
        buffer += chunk
    if named(bytes(buffer[:_HEAD])) not in (None, "JPEG") or _is_tga(buffer):
        yield bytes(buffer) + stream.read(_WHOLE)
        return
    while True:
        start = buffer.find(b"\xff\xd8\xff")
        del buffer[: start if start >= 0 else -2]
        at, whole, too_large = 2, False, False
        while start >= 0:
            at, whole = jpeg.walk(buffer, at)
            if whole or not (chunk := read(_CHUNK)):
                break
            if not too_large and len(buffer) > _WHOLE:
                too_large = True
                tell(f"error: -: a JPEG image of more than {_WHOLE:,} bytes is left out; give it as a file")
            if too_large:  # a preview in the rest of it is not taken for an image
                passed = min(at, len(buffer))
                del buffer[:passed]
                at -= passed
            buffer += chunk
        if whole:
            if not too_large:
                yield bytes(buffer[:at])
            del buffer[:at]
        elif start < 0 and (chunk := read(_CHUNK)):
            buffer += chunk
        else:
            return


def _is_tga(data: bytes | bytearray) -> bool:
    """Whether a file begins as a TGA does, which has no signature: with the kinds of its colours and of its pixels."""
    return len(data) >= _HEAD and data[1] < 2 and data[2] in (1, 2, 3, 9, 10, 11) and data[16] in (1, 8, 16, 24, 32)
