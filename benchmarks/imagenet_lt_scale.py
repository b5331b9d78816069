"""`python -m benchmarks.imagenet_lt_scale --counts FILE --images FOLDER`: a data set of ImageNet-LT's true shape, end to end.

FILE: ImageNet-LT's training list, or its class counts as JSON (1,000 classes, 115,846 images in all). The images are the JPEG
files below FOLDER, over and over: small ones, so that what is measured is what grows with the number of images and classes:
writing, counting, orders, draws, batches. Two views of 32 pixels, cut and resized. Decoding: `benchmarks.imagenet_loader`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.dataset_counts import imagenet_lt_counts
from benchmarks.measure import report
from pipelines.common.cores import usable_cores
from pipelines.common.errors import run_command
from pipelines.config import DataConfig, LoaderConfig, RandomResizedCrop, Sampling, Store, View
from pipelines.loaders.ffcv_loader import FFCVLoader
from pipelines.loaders.reading import Loader, ReadPlan, Share
from pipelines.prepare.beton import Beton
from pipelines.prepare.pictures import save_histogram
from pipelines.prepare.sources import DigitsSource, Images, class_counts
from pipelines.prepare.writer import write_split

BATCH = 256
VIEW = View(cut=RandomResizedCrop(kind="resized"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.imagenet_lt_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=Path, required=True, help="the training list, or the class counts as JSON")
    parser.add_argument("--images", type=Path, required=True, help="a folder with JPEG files, in any depth")
    parser.add_argument("--quick", action="store_true", help="a tenth of each class")
    arguments = parser.parse_args()
    counts = imagenet_lt_counts(arguments.counts)
    counts = np.maximum(1, counts // 10) if arguments.quick else counts
    total, classes = int(counts.sum()), [str(label) for label in range(len(counts))]
    seconds: dict[str, float] = {}

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - began, 2)

    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        parser.error(f"--images {arguments.images}: no JPEG files there")
    images = Images(
        [str(number) for number in range(total)],
        np.repeat(np.arange(len(counts)), counts),
        files=[files[number % len(files)] for number in range(total)],
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = DataConfig(source=DigitsSource(kind="digits"), store=Store(mode="jpeg", shard_mb=32))
        with clock("write"):
            progress = write_split(folder, "train", images, data, seed=0)
        with clock("open"):
            beton = Beton(*(folder / shard.file for shard in progress.shards))
        with clock("histogram"):
            found = class_counts(beton.labels, len(counts))
            save_histogram(folder / "class_counts.png", classes, found)
        assert found.tolist() == counts.tolist()
        epochs: dict[Sampling, dict[str, float]] = {}
        for sampling in ("instance", "square_root", "class_balanced"):
            epochs[sampling] = _epoch(_loader(beton, sampling, Share(), usable_cores()), number=1)
        epochs["class_balanced"]["classes_seen_once_or_more"] = _classes_seen(beton)
        two = _two_processes(beton.paths)
        report(
            images=total,
            classes=len(counts),
            files=len(progress.shards),
            stored_mb=round(progress.stored / 1e6, 1),
            file_mb=round(sum(shard.bytes for shard in progress.shards) / 1e6, 1),
            mean_bytes=round(progress.stored / total),
            seconds=seconds,
            epochs=epochs,
            two_processes=two,
            peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            ratios={
                "class_balanced_over_instance": _over(epochs["class_balanced"], epochs["instance"]),
                "two_processes_over_one": _over(two, epochs["instance"]),
            },
        )


def _over(first: dict[str, float], second: dict[str, float]) -> float:
    return round(first["images_per_s"] / second["images_per_s"], 2)


def _loader(beton: Beton, sampling: Sampling, share: Share, threads: int) -> Loader:
    plan = ReadPlan((VIEW, VIEW), 32, BATCH, 0, sampling, drop_last=True, share=share)
    return FFCVLoader(beton, plan, LoaderConfig(workers=threads))


def _epoch(loader: Loader, number: int) -> dict[str, float]:
    """Images/s of a whole epoch, after one batch of another; and how long its order and its draws take to the first batch."""
    other = loader.epoch(0)
    next(other)
    loader.close()
    began = time.perf_counter()
    first, seen = 0.0, 0
    for batch in loader.epoch(number):
        first = first or time.perf_counter() - began
        seen += len(batch.labels)
    spent = time.perf_counter() - began
    return {"images_per_s": round(seen / spent), "seconds": round(spent, 2), "to_first_batch": round(first, 3)}


def _classes_seen(beton: Beton) -> float:
    plan = ReadPlan((VIEW,), 32, BATCH, 0, "class_balanced", drop_last=True)
    return len(np.unique(beton.labels[plan.order(beton, 1)]))


def _worker(paths: tuple[Path, ...], number: int, queue: multiprocessing.Queue) -> None:
    loader = _loader(Beton(*paths), "instance", Share(number, 2), max(1, usable_cores() // 2))
    queue.put(_epoch(loader, 1))
    queue.put(np.concatenate([batch.index.numpy().copy() for batch in loader.epoch(2)]))


def _two_processes(paths: tuple[Path, ...]) -> dict[str, float]:
    """An epoch shared by two processes: together they see what one would."""
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue() for _ in range(2)]
    workers = [context.Process(target=_worker, args=(paths, number, queue)) for number, queue in enumerate(queues)]
    for worker in workers:
        worker.start()
    figures = [queue.get(timeout=600) for queue in queues]
    seen = [queue.get(timeout=600) for queue in queues]
    for worker in workers:
        worker.join()
    one = ReadPlan((VIEW, VIEW), 32, BATCH, 0, "instance", drop_last=True)
    order = one.order(Beton(*paths), 2)
    assert sorted(np.concatenate(seen).tolist()) == sorted(order[: len(order) // BATCH * BATCH].tolist())
    return {
        "images_per_s": sum(entry["images_per_s"] for entry in figures),
        "seconds": max(entry["seconds"] for entry in figures),
        "to_first_batch": max(entry["to_first_batch"] for entry in figures),
    }


if __name__ == "__main__":
    run_command(main)
