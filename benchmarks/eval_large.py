"""`python -m benchmarks.eval_large`: evaluation of 12-megapixel JPEG files against the same pixels stored raw.

Two folders: JPEG files of 4000x3000, and PNG files of their pixels scaled to `max_side`, which are stored raw. Both are
prepared with the defaults; evaluation images/s by the evaluation loader at 224 pixels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.measure import alternate, report
from pipelines.common.errors import run_command
from pipelines.config import DataConfig, LoaderConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import eval_plan
from pipelines.pixels import scaled, stored_size
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.prepared import Prepared

WIDTH, HEIGHT, BATCH = 4000, 3000, 32


def _write(folder: Path, count: int, large: bool) -> DataConfig:
    """An image folder of two classes, and its configuration."""
    data = DataConfig.model_validate(
        {
            "source": {"kind": "folder", "path": str(folder)},
            "prepared": str(folder.parent / f"prepared-{folder.name}"),
            "size": 224,
            "eval_cut": {"kind": "center", "ratio": 0.875},
            "views": [{"cut": {"kind": "resized"}}],
        }
    )
    for label, photo in enumerate(load_sample_images().images):
        image = Image.fromarray(photo).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        for split, number, start in (("train", 1, 0), ("test", count // 2, 1)):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for n in range(start, start + number):
                shifted = Image.fromarray(np.roll(np.asarray(image), 37 * n, axis=1))
                if large:
                    shifted.save(place / f"{n}.jpg", quality=90)
                else:
                    scaled(shifted, stored_size(*shifted.size, None, data.store.max_side)).save(place / f"{n}.png")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval_large", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer images and rounds")
    arguments = parser.parse_args()
    count = 12 if arguments.quick else 64

    def side(prepared: Prepared, data: DataConfig) -> Callable[[], int]:
        loader = make_loader(prepared, "test", eval_plan(data, BATCH), LoaderConfig())
        repeats = max(1, 192 // count)
        return lambda: sum(len(batch.labels) for _ in range(repeats) for batch in loader.epoch(0))

    with tempfile.TemporaryDirectory() as folder:
        configs = {"large": _write(Path(folder, "large"), count, True), "raw": _write(Path(folder, "raw"), count, False)}
        sides = {name: side(ensure_prepared(data, 0), data) for name, data in configs.items()}
        rates = alternate(sides, rounds=3 if arguments.quick else 9)
    ratio = round(rates["large"]["median"] / rates["raw"]["median"], 2)
    report(images_per_s=rates, images=count, pixels=[WIDTH, HEIGHT], ratios={"eval_large_over_raw": ratio})


if __name__ == "__main__":
    run_command(main)
