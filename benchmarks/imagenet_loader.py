"""`python -m benchmarks.imagenet_loader --images FOLDER`: images/s with one, two and three views of 224 pixels from JPEG files.

Four sides, in turn, on the same JPEG bytes and the same cores: this project's loader; FFCV's own way, a pipeline a view;
torchvision's DataLoader, which decodes an image once (workers that stay alive, files in memory, v2 transforms on uint8; with
Pillow's decoder and with torchvision's, the faster counts); and turbojpeg alone, decoding into one buffer a core: the limit.

Two sets: the folder's files as they are, and the same pictures enlarged to the size of ImageNet's files (500 pixels, 110 KB).
Each ratio is the lower one of the two sets.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
import torchvision
from ffcv.libffcv import resize_crop
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.measure import alternate, report
from pipelines.common.cores import usable_cores
from pipelines.common.errors import run_command
from pipelines.config import LoaderConfig, RandomResizedCrop, Store, View
from pipelines.loaders.cut_kernel import Table, cut_batch, make_work
from pipelines.loaders.cuts import draw_cuts
from pipelines.loaders.ffcv_loader import FFCVLoader
from pipelines.loaders.reading import ReadPlan
from pipelines.loaders.turbojpeg import Decoders
from pipelines.prepare.beton import Beton, BetonWriter
from pipelines.prepare.images import pack
from pipelines.prepare.sources import open_folder

SIZE, BATCH = 224, 64
SIDE, BYTES = 500, 110_000  # ImageNet's: most common longer side, mean size of a file
FAST_DCT = 2048  # TJFLAG_FASTDCT, as FFCV decodes


class _Peer(Dataset):
    """V crops and flips of each image by torchvision, uint8 (V, 3, 224, 224): decoded once."""

    def __init__(self, files: list[bytes], views: int, decoder: str) -> None:
        self.files, self.views, self.decoder = files, views, decoder
        self.transform = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        data = self.files[index]
        if self.decoder == "pillow":
            image = Image.open(io.BytesIO(data)).convert("RGB")
            return torch.stack([v2.functional.pil_to_tensor(self.transform(image)) for _ in range(self.views)])
        pixels = torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return torch.stack([self.transform(pixels) for _ in range(self.views)])


def enlarged(files: list[bytes]) -> list[bytes]:
    """The same pictures with `SIDE` pixels on the longer side, at the JPEG quality whose files come nearest to `BYTES`."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    large = [im.resize([round(side * SIDE / max(im.size)) for side in im.size], Image.Resampling.LANCZOS) for im in images]

    def encode(quality: int, chosen: list[Image.Image]) -> list[bytes]:
        buffers = [io.BytesIO() for _ in chosen]
        for image, buffer in zip(chosen, buffers, strict=True):
            image.save(buffer, "JPEG", quality=quality)
        return [buffer.getvalue() for buffer in buffers]

    sample = large[:: max(1, len(large) // 50)]
    quality = min(range(80, 101), key=lambda q: abs(np.mean([len(data) for data in encode(q, sample)]) - BYTES))
    return encode(quality, large)


def write(path: Path, files: list[bytes], repeats: int) -> list[bytes]:
    """A .beton of the files, `repeats` times over; returns the stored bytes."""
    packed = [pack(data, Store(max_side=SIDE)) for data in files] * repeats
    with BetonWriter(path, len(packed)) as writer:
        for number, image in enumerate(packed):
            writer.append(image, number % 10)
        writer.finish()
    return [image.data for image in packed]


def sides(path: Path, files: list[bytes], cores: int, counts: tuple[int, ...]) -> dict[str, Callable[[], int]]:
    beton = Beton(path)
    runs: dict[str, Callable[[], int]] = {}
    epochs = iter(range(10**6))

    def ours(loader: FFCVLoader) -> int:
        return sum(len(batch.labels) for batch in loader.epoch(next(epochs)))

    def peer(loader: DataLoader) -> int:
        return sum(len(views) for views in loader)

    for views in counts:
        cut = View(cut=RandomResizedCrop(kind="resized"))
        plan = ReadPlan((cut,) * views, SIZE, BATCH, 0, "instance", drop_last=True)
        runs[f"ours_{views}"] = partial(ours, FFCVLoader(beton, plan, LoaderConfig(workers=cores)))
        runs[f"ffcv_{views}"] = ffcv(path, views, cores)
        for decoder in ("pillow", "torchvision"):
            loader = DataLoader(
                _Peer(files, views, decoder), BATCH, shuffle=True, drop_last=True, num_workers=cores, persistent_workers=True
            )
            runs[f"torchvision_{views}_{decoder}"] = partial(peer, loader)
    runs["turbojpeg_alone"] = limit(beton, cores)
    return runs


def ffcv(path: Path, views: int, cores: int) -> Callable[[], int]:
    """FFCV's own way to several views: a pipeline for each, which decodes again."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    def pipeline() -> PipelineSpec:
        return PipelineSpec(
            "image", RandomResizedCropRGBImageDecoder((SIZE, SIZE)), transforms=[RandomHorizontalFlip(), ToTensor()]
        )

    threads = torch.get_num_threads()
    loader = Loader(
        str(path.resolve()),
        batch_size=BATCH,
        num_workers=cores,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        seed=0,
        pipelines={"image": None, "label": None, **{f"view{number}": pipeline() for number in range(views)}},
    )
    torch.set_num_threads(threads)
    return lambda: sum(len(batch[0]) for batch in loader)


def limit(beton: Beton, cores: int) -> Callable[[], int]:
    """turbojpeg alone: every image decoded to RGB, nothing kept."""
    library = ctypes.CDLL("libturbojpeg.so.0")
    library.tjInitDecompress.restype = ctypes.c_void_p
    widths, heights = beton.widths, beton.heights
    jobs = list(zip(beton.addresses.tolist(), beton.sizes.tolist(), widths.tolist(), heights.tolist(), strict=True))
    room = 3 * int(widths.max()) * int(heights.max())

    def decode(part: list[tuple[int, int, int, int]]) -> None:
        decoder, pixels = ctypes.c_void_p(library.tjInitDecompress()), np.empty(room, np.uint8)
        out = ctypes.c_void_p(pixels.ctypes.data)
        for address, size, width, height in part:
            data, length = ctypes.c_void_p(address), ctypes.c_ulong(size)
            library.tjDecompress2(decoder, data, length, out, width, 0, height, 0, FAST_DCT)
        library.tjDestroy(decoder)

    def run() -> int:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(decode, [jobs[core::cores] for core in range(cores)]))
        return len(jobs)

    return run


def profile(beton: Beton, rows: int = 256) -> dict[str, float]:
    """Microseconds an image or a cut on one core: what a step of the loader takes, and what others take for the same."""
    library = ctypes.CDLL("libturbojpeg.so.0")
    library.tjInitDecompress.restype = ctypes.c_void_p
    decoder, pixels = ctypes.c_void_p(library.tjInitDecompress()), np.empty(4 * (SIDE + 16) ** 2, np.uint8)
    out, third = ctypes.c_void_p(pixels.ctypes.data), (SIDE + 16) ** 2
    planes = (ctypes.c_void_p * 3)(*(pixels.ctypes.data + number * third for number in range(3)))
    rows = min(rows, len(beton))
    heights, widths = beton.heights[:rows].astype(np.int32), beton.widths[:rows].astype(np.int32)
    jobs = list(zip(beton.addresses.tolist(), beton.sizes.tolist(), widths.tolist(), heights.tolist(), strict=False))[:rows]
    views = (View(cut=RandomResizedCrop(kind="resized")),) * 3
    cuts = draw_cuts(views, SIZE, heights, widths, 0, 0)

    def to_rgb() -> None:
        for address, size, width, height in jobs:
            data, length = ctypes.c_void_p(address), ctypes.c_ulong(size)
            library.tjDecompress2(decoder, data, length, out, width, 0, height, 0, FAST_DCT)

    def to_planes() -> None:
        for address, size, width, height in jobs:
            data, length = ctypes.c_void_p(address), ctypes.c_ulong(size)
            library.tjDecompressToYUVPlanes(decoder, data, length, planes, width, None, height, 0)

    decoders = Decoders(1)
    work = make_work(decoders.handles, SIZE, heights, widths)
    outputs = {count: np.empty((rows, count, SIZE, SIZE, 3), np.uint8) for count in (1, 3)}
    ones, zeros = np.ones(rows, np.int32), np.zeros(rows, np.int32)

    def cut(count: int) -> None:
        table = Table(beton.addresses[:rows], beton.sizes[:rows], ones, heights, widths, cuts[:, :count].copy(), zeros)
        cut_batch(np.arange(rows), outputs[count], table, work)

    def cuts_of_both() -> None:
        cut(3)
        cut(1)

    images = [
        torch.from_numpy(np.array(Image.open(io.BytesIO(beton.image(row).tobytes())).convert("RGB"))) for row in range(rows)
    ]
    small = np.empty((SIZE, SIZE, 3), np.uint8)

    def opencv() -> None:
        for image, (top, left, height, width, _) in zip(images, cuts[:, 0].tolist(), strict=True):
            resize_crop(image.numpy(), top, top + height, left, left + width, small)

    def torchvision_() -> None:
        for image, (top, left, height, width, _) in zip(images, cuts[:, 0].tolist(), strict=True):
            box = v2.functional.crop(image.permute(2, 0, 1), top, left, height, width)
            v2.functional.resize(box, [SIZE, SIZE], antialias=True)

    def draws() -> None:
        stream = ReadPlan(views[:2], SIZE, BATCH, 0, "instance", drop_last=True)
        order = stream.order(beton, 1)
        draw_cuts(views[:2], SIZE, beton.heights[order], beton.widths[order], 0, 1)

    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    steps = {
        "decode to planes": (to_planes, rows),
        "decode to RGB (FFCV)": (to_rgb, rows),
        "cut of planes": (cuts_of_both, 2 * rows),
        "resize by OpenCV's area (FFCV)": (opencv, rows),
        "resize by torchvision, antialiased": (torchvision_, rows),
        "order and draws, two views": (draws, len(beton)),
    }
    found = {}
    for name, (run, units) in steps.items():
        run()
        spent = []
        for _ in range(5):
            began = time.perf_counter()
            run()
            spent.append((time.perf_counter() - began) / units * 1e6)
        found[name] = statistics.median(spent)
    # Decoded twice, and cut three times and once: four cuts and two decodings of each image.
    found["cut of planes"] = (2 * found["cut of planes"] - 2 * found["decode to planes"]) / 4
    library.tjDestroy(decoder)
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])
    return {name: round(value, 1) for name, value in found.items()}


def ratios(rates: dict[str, dict[str, float]], counts: tuple[int, ...]) -> dict[str, float]:
    def rate(name: str) -> float:
        return max(entry["median"] for key, entry in rates.items() if key.startswith(name))

    names = {1: "one", 2: "two", 3: "three"}
    found = {
        f"{names[views]}_view_over_{peer}": rate(f"ours_{views}") / rate(f"{peer}_{views}")
        for peer in ("ffcv", "torchvision")
        for views in counts
    }
    return found | {f"{names[views]}_view_over_limit": rate(f"ours_{views}") / rate("turbojpeg_alone") for views in (1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.imagenet_loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="an image folder (train/CLASS/*) of natural JPEG files")
    parser.add_argument("--quick", action="store_true", help="under a minute: two views at most, fewer files and rounds")
    arguments = parser.parse_args()
    folder = arguments.images / "train"
    images = open_folder(folder, sorted(path.name for path in folder.iterdir()))
    natural = [data for number in range(len(images)) if isinstance(data := images.read(number), bytes)]
    natural = natural[:256] if arguments.quick else natural
    cores = usable_cores()
    counts = (1, 2) if arguments.quick else (1, 2, 3)  # numba compiles FFCV's pipelines in every process: half a minute
    sets = {"natural": natural} if arguments.quick else {"natural": natural, "imagenet_sized": enlarged(natural)}
    figures: dict[str, dict] = {}
    of_set = []
    with tempfile.TemporaryDirectory() as place:
        for name, files in sets.items():
            stored = write(Path(place) / f"{name}.beton", files, repeats=1 if arguments.quick else 4)
            rates = alternate(sides(Path(place) / f"{name}.beton", stored, cores, counts), rounds=2 if arguments.quick else 5)
            of_set.append(ratios(rates, counts))
            figures[name] = {
                "images_per_s": rates,
                "ratios": {key: round(ratio, 2) for key, ratio in of_set[-1].items()},
                "microseconds_on_one_core": {} if arguments.quick else profile(Beton(Path(place) / f"{name}.beton")),
                "mean_bytes": round(np.mean([len(data) for data in files])),
                "mean_size": np.mean([Image.open(io.BytesIO(data)).size for data in files], axis=0).round().tolist(),
            }
    report(
        sets=figures,
        size=SIZE,
        batch=BATCH,
        ratios={key: round(min(entry[key] for entry in of_set), 2) for key in of_set[0]},
    )


if __name__ == "__main__":
    run_command(main)
