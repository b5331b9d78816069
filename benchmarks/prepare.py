"""Preparing by one process, by two tasks of Ray and from a bucket; and an epoch of it beside webdataset's of the same shards.

    python -m benchmarks.prepare FOLDER [--repeat N] [--quick]

FOLDER has train/CLASS/* with photographs. WebDataset shards of them are written first, by webdataset itself, and everything
reads these shards, or files of the same bytes. With few photographs, what is done once (opening, a picture of the class counts:
a second) takes much of the time; --repeat writes each so many times. The last line is JSON. Its ratios:

    prepare_2_over_1        two tasks of Ray over one process with one core
    epoch_over_webdataset   two 224-pixel views (crop, flip) from .beton files over webdataset with torchvision's transforms,
                            two workers each
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import alternate, report
from pipelines.augment.recipe import Augment
from pipelines.common.cores import CORES
from pipelines.common.errors import UserError, run_command
from pipelines.config import DataConfig, LoaderConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import train_plan
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.on_ray import RayPacker, cluster
from pipelines.prepare.prepared import Prepared
from pipelines.prepare.sources import FolderSource, Images

BATCH, WORKERS, SIZE = 64, 2, 224
VIEW = {"cut": {"kind": "resized"}, "flip": 0.5}


def write_shards(images: Images, folder: Path) -> str:
    """WebDataset shards of the images, at least eight; their pattern."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%03d.tar"), maxcount=-(-len(images) // 8), verbose=0) as shards:
        for row in range(len(images)):
            shards.write({"__key__": f"{row:06d}", "jpg": images.read(row), "cls": int(images.labels[row])})
    return str(folder / "train-*.tar")


def data_of(source: dict[str, Any], prepared: Path) -> DataConfig:
    content = {"source": source, "prepared": str(prepared), "size": SIZE, "views": [VIEW, VIEW], "val_fraction": 0.05}
    return DataConfig.model_validate({**content, "profile": {"kind": "none"}, "store": {"max_side": 256}})


def preparing(source: dict[str, Any], place: Path, workers: int | None) -> Callable[[], int]:
    """Prepare everything once more, by tasks, or by this process alone with one core."""

    def run() -> int:
        shutil.rmtree(place, ignore_errors=True)
        if workers is None:
            os.environ[CORES] = "1"
        try:
            done = ensure_prepared(data_of(source, place), 0, packer=None if workers is None else RayPacker(workers))
        finally:
            os.environ.pop(CORES, None)
        return sum(split.samples for split in done.splits.values())

    return run


def beton_epoch(prepared: Prepared, data: DataConfig) -> Callable[[], int]:
    plan = train_plan(data, BATCH, 0)
    loader = make_loader(prepared, "train", plan, LoaderConfig(workers=WORKERS))
    augment = Augment(plan.views, plan.size, plan.seed)
    epochs = iter(range(1000))

    def run() -> int:
        epoch = next(epochs)
        return sum(len(augment(batch.views, epoch, step)) for step, batch in enumerate(loader.epoch(epoch)))

    return run


def webdataset_epoch(pattern: str) -> Callable[[], int]:
    import webdataset
    from torchvision.transforms import v2

    one = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def views(sample: tuple[Any, int]) -> tuple[torch.Tensor, int]:
        image = sample[0].convert("RGB")
        return torch.stack([one(image), one(image)]), sample[1]

    paths = sorted(map(str, Path(pattern).parent.glob(Path(pattern).name)))

    def run() -> int:
        shards = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
        samples = shards.shuffle(1000).decode("pil").to_tuple("jpg", "cls").map(views)
        loader: Any = torch.utils.data.DataLoader(samples, batch_size=BATCH, num_workers=WORKERS)
        return sum(len(images) for images, _ in loader)

    return run


def plain_iteration(pattern: str, images: Images) -> dict[str, Callable[[], int]]:
    """One pass over the decoded images, by the libraries alone."""
    import datasets
    import webdataset

    paths = sorted(map(str, Path(pattern).parent.glob(Path(pattern).name)))
    cells = [{"bytes": images.read(row), "path": None} for row in range(len(images))]
    table = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
    return {
        "datasets": lambda: sum(1 for row in table if row["image"].convert("RGB")),
        "webdataset": lambda: sum(
            1 for (image,) in webdataset.WebDataset(paths, shardshuffle=False).decode("pilrgb").to_tuple("jpg") if image
        ),
    }


@contextmanager
def bucket(images: Images, classes: list[str]) -> Iterator[str]:
    """The images in a bucket of a local S3 server."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    os.environ |= {"RAY_worker_niceness": "0"}  # as the one process has
    storage = fsspec.filesystem("s3")
    storage.mkdir("photos")
    for row, label in enumerate(images.labels):
        storage.pipe_file(f"photos/train/{classes[label]}/{row}.jpg", images.read(row))
    try:
        yield "s3://photos"
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="200 images, one round")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="write each photograph so many times")
    arguments = parser.parse_args()
    dataset = FolderSource(kind="folder", path=arguments.folder).open()
    images, rounds = dataset.train, 1 if arguments.quick else 3
    if len(images) < BATCH * WORKERS:
        raise UserError(f"{arguments.folder}: {len(images)} training images; at least {BATCH * WORKERS} are needed")
    if arguments.quick:
        images = images.take(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:200].numpy())
    images = images.take(np.tile(np.arange(len(images)), arguments.repeat))
    # The bucket first: its credentials are in the environment that the cluster's processes inherit.
    with tempfile.TemporaryDirectory() as folder, bucket(images, dataset.classes) as address, cluster(None):
        place = Path(folder)
        pattern = write_shards(images, place / "shards")
        source = {"kind": "webdataset", "train": pattern}
        remote = {"kind": "folder", "path": address}
        prepare = alternate(
            {
                "one_process": preparing(source, place / "one", None),
                "two_tasks": preparing(source, place / "two", 2),
                "two_tasks_from_s3": preparing(remote, place / "s3", 2),
                **plain_iteration(pattern, images),
            },
            rounds,
        )
        data = data_of(source, place / "two")
        prepared = ensure_prepared(data, 0)
        epoch = alternate({"beton": beton_epoch(prepared, data), "webdataset": webdataset_epoch(pattern)}, rounds)
    for name, rate in (prepare | {f"epoch of {name}": rate for name, rate in epoch.items()}).items():
        print(f"{name:<22}{rate['median']:>10,.1f} images/s   ({rate['lowest']:,.1f} to {rate['highest']:,.1f})")
    report(
        images=len(images),
        prepare_images_per_s=prepare,
        epoch_images_per_s=epoch,
        ratios={
            "prepare_2_over_1": round(prepare["two_tasks"]["median"] / prepare["one_process"]["median"], 2),
            "epoch_over_webdataset": round(epoch["beton"]["median"] / epoch["webdataset"]["median"], 2),
        },
    )


if __name__ == "__main__":
    run_command(main)
