"""Memory that preparing takes for its index: names, labels, order, what is written, copies. No image is read.

    python -m benchmarks.index_memory [--images N] [--source folder | table | lists]

The names are as in ImageNet (39 characters); `table` is a Parquet file of addresses (66 characters) and classes, `lists` a list
of paths below an address. Images of one pixel take the place of decoded ones. The last line is JSON: bytes an image by which
the process has grown, when the index is there, and at the highest; without what lies in files, of which the system keeps in
memory what it has room for.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.measure import report
from pipelines.common.errors import run_command
from pipelines.config import DataConfig
from pipelines.prepare import build
from pipelines.prepare.images import Packed
from pipelines.prepare.sources import Images, ListsSource
from pipelines.prepare.sources.dataset import Below
from pipelines.prepare.sources.table import TableSource
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


def as_folder(folder: Path, count: int) -> Images:
    """Images as the source `folder` lists them."""
    files = Texts(names(count))
    labels = np.arange(count, dtype=np.int64)
    labels *= CLASSES
    labels //= count
    return Images(files, labels, files=Below(folder, files))


def write_table(path: Path, count: int) -> None:
    """A Parquet file, in parts, so that it takes no memory to speak of."""
    import pyarrow
    import pyarrow.parquet

    columns = pyarrow.schema([("url", pyarrow.string()), ("label", pyarrow.string())])
    every = names(count)
    with pyarrow.parquet.ParquetWriter(path, columns) as file:
        while some := [*islice(every, 1 << 16)]:
            urls = [f"https://images.example.org/{name}" for name in some]
            file.write_batch(pyarrow.record_batch([urls, [name.split("/")[1] for name in some]], columns))


def write_list(path: Path, count: int) -> None:
    """A split list."""
    with path.open("w") as file:
        file.writelines(f"{name} {row * CLASSES // count}\n" for row, name in enumerate(names(count)))


def by_another(write: Callable[[Path, int], None], path: Path, count: int) -> None:
    """Write a file by another process, whose memory is not this one's."""
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, count))
    writer.start()
    writer.join()


def prepare(source: str, count: int) -> int:
    """Prepare so many images. Returns the bytes of the process's memory when the index is there."""
    data = DataConfig.model_validate({"source": {"kind": "digits"}, "store": {"mode": "raw", "shard_mb": 4}})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if source == "table":
            by_another(write_table, folder / "table.parquet", count)
            images = TableSource(kind="table", path=folder / "table.parquet").open().train
        elif source == "lists":
            by_another(write_list, folder / "list.txt", count)
            images = ListsSource(kind="lists", root="https://images.example.org", train=folder / "list.txt").open().train
        else:
            images = as_folder(folder, count)
        index = memory()
        classes = [f"{label:08d}" for label in range(CLASSES)]
        build._write(folder, (classes, {"train": images}), data, 0, False, one_pixel)
    return index


def memory() -> int:
    """Bytes of this process that no file holds."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) << 10


@contextlib.contextmanager
def highest() -> Iterator[list[int]]:
    """Yield a list that has, at the end, the bytes of this process's memory at its highest, by looking every 5 ms."""
    seen, ended = [memory()], threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            seen[0] = max(seen[0], memory())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        ended.set()
        looking.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--source", choices=["folder", "table", "lists"], default="folder")
    arguments = parser.parse_args()
    count = arguments.images
    prepare(arguments.source, 2 * CLASSES)  # libraries are loaded
    before = memory()
    with highest() as most:
        index = prepare(arguments.source, count)
    report(
        source=arguments.source,
        images=count,
        bytes_an_image={"index": round((index - before) / count, 1), "at the highest": round((most[0] - before) / count, 1)},
    )


if __name__ == "__main__":
    run_command(main)
