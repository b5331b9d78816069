"""Memory that preparing takes for its index: names, labels, order, what is written, copies. No image is read.

    python -m benchmarks.index_memory [--images N]

The names are as in ImageNet. Images of one pixel take the place of decoded ones. The last line is JSON: bytes an image by
which the process has grown, when the index is there, and at the highest.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np

from benchmarks.measure import report
from pipelines.common.errors import run_command
from pipelines.config import DataConfig
from pipelines.prepare import build
from pipelines.prepare.images import Packed
from pipelines.prepare.sources import Images
from pipelines.prepare.sources.dataset import Below
from pipelines.prepare.sources.texts import Texts
from pipelines.prepare.writer import Result

CLASSES = 1000


def names(images: int) -> Iterator[str]:
    """As train/n00000042/n00000042_00000007.JPEG."""
    for row in range(images):
        label = row * CLASSES // images
        yield f"train/n{label:08d}/n{label:08d}_{row:08d}.JPEG"


def one_pixel(
    images: Images, order: np.ndarray, data: DataConfig, seed: int, lossless: bool
) -> Generator[tuple[int, Result], None, None]:
    """In the place of `pack_all`."""
    for row in map(int, order):
        yield row, (Packed(False, 1, 1, b"\0\0\0"), hashlib.sha256(b"%d" % row).digest())


def prepare(count: int) -> int:
    """Prepare so many images. Returns the bytes of the process's memory at its highest, when the index is there."""
    data = DataConfig.model_validate({"source": {"kind": "digits"}, "store": {"mode": "raw", "shard_mb": 4}})
    with tempfile.TemporaryDirectory() as folder:
        files = Texts(names(count))  # as a source lists them
        labels = np.arange(count, dtype=np.int64) * CLASSES // count
        images = Images(files, labels, files=Below(Path(folder), files))
        del files
        index = highest()
        classes = [f"{label:08d}" for label in range(CLASSES)]
        build._write(Path(folder), (classes, {"train": images}), data, 0, False, one_pixel)
    return index


def highest() -> int:
    """Bytes of this process's memory at its highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    count = parser.parse_args().images
    prepare(2 * CLASSES)  # libraries are loaded
    before = highest()
    index = prepare(count)
    report(
        images=count,
        bytes_an_image={"index": round((index - before) / count, 1), "at the highest": round((highest() - before) / count, 1)},
    )


if __name__ == "__main__":
    run_command(main)
