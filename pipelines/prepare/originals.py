"""The images of a prepared split as the source has them: the files that a client would send to a server."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

from PIL import Image

from pipelines.config import DataConfig
from pipelines.prepare.prepared import Prepared
from pipelines.prepare.sources.addresses import NetworkError
from pipelines.prepare.sources.dataset import AbsentError
from pipelines.prepare.splits import choose, subset_seed
from pipelines.prepare.writer import line_of

log = logging.getLogger(__name__)


def original_images(prepared: Prepared, split: str, data: DataConfig, seed: int, count: int) -> Iterator[tuple[bytes, str]]:
    """Read the first `count` images of a split, in the order of its files.

    If the source is gone or has changed, the stored images are returned instead. Pixels become PNG files.

    Args:
        prepared: The prepared data.
        split: 'train', 'val' or 'test'.
        data: Their configuration.
        seed: Of the run.
        count: How many images.

    Yields:
        The bytes of an image file, and its place for messages.
    """
    beton = prepared.beton(split)
    names = prepared.names(split)
    images = None
    if data.source.present() and len(names) == len(beton):  # an earlier version wrote ends of lines in names as they are
        with contextlib.suppress(AbsentError, NetworkError):
            _, splits = choose(data.source.open(), data, subset_seed(data, seed))
            if split in splits and splits[split].digest() == prepared.splits[split].source_digest:
                images = splits[split]
    if images is None:
        log.warning("the original images of the %s split are gone or have changed; the stored ones replace them", split)
    rows = {line_of(name): row for row, name in enumerate(images.names)} if images is not None else {}
    for row in range(min(count, len(beton))):
        if images is not None:
            content = images.read(rows[names[row]])
            place = images.place(rows[names[row]], split)
        else:
            stored = beton.image(row)
            content = stored if beton.is_raw[row] else stored.tobytes()
            place = beton.where(row)
        if not isinstance(content, bytes):
            buffer = io.BytesIO()
            Image.fromarray(content).save(buffer, "PNG")
            content = buffer.getvalue()
        yield content, place
