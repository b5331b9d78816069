"""`python -m benchmarks.photos [--images FOLDER] [--quick | --table LINES]`: photographs, this project and the plain way.

Without `--table` it measures speed, each side in turn: features of JPEG files, a head on features, full fine-tuning, and the
seconds from the command to the table of accuracies for 1,000 photographs. The last line is JSON. `--table LINES` compares
accuracies instead: it trains the rows and seeds that the file LINES lacks, and prints a table in Markdown.

FOLDER is an image folder with `train`. Without it, 1,000 crops of scikit-learn's two photographs in ten classes are used.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.measure import report
from benchmarks.photos_table import NAMES, QUICK, C, features, make_table, score_logistic
from cibl_ray.config import RunConfig, load_config
from cibl_ray.features.extract import Extractor
from cibl_ray.hardware import resolve
from cibl_ray.training.trainer import Trainer
from pipelines.common.errors import UserError, run_command
from pipelines.prepare.build import ensure_prepared

BATCH = 32  # images in a step of full fine-tuning
MODEL = "tf_efficientnet_lite0"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photos", description=__doc__)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="with train/CLASS/*, and test for --table")
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer images and rounds")
    parser.add_argument("--table", type=Path, metavar="LINES", help="compare accuracies; JSON lines of what is done")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=QUICK, help="of the table; by default those on features")
    parser.add_argument("--seeds", type=int, default=3, help="of each row (default: 3)")
    parser.add_argument("--prepared", type=Path, default=Path("prepared"), help="folder of the prepared data")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.table is not None:
            if arguments.images is None:
                raise UserError("--table compares on photographs: --images FOLDER")
            print(make_table(arguments.images, arguments.prepared, arguments.rows, arguments.seeds, arguments.table))
            return
        thousand = _thousand(arguments.images, Path(scratch) / "images")
        report(**speed(thousand, arguments.images or thousand, Path(scratch), arguments.quick))


def speed(images: Path, all_images: Path, scratch: Path, quick: bool) -> dict[str, Any]:
    """Rates and seconds of each side, and their ratios.

    Args:
        images: A folder with train/CLASS/*.jpg, 1,000 images in all.
        all_images: The same or a larger folder, for heads.
        scratch: A folder for what is written.
        quick: Fewer images and rounds.
    """
    files = sorted((images / "train").rglob("*.jpg"))
    files = [files[i] for i in np.linspace(0, len(files) - 1, min(len(files), 128 if quick else 512)).astype(int)]
    steps, rounds = (2, 2) if quick else (4, 3)
    first = _seconds_to_table(images, scratch, "first")
    second = _seconds_to_table(images, scratch, "second")
    print(f"1,000 photographs, command to table: {first:.0f} s, again {second:.0f} s", flush=True)
    flags = ["--data.source.path", str(images), "--data.prepared", str(scratch / "prepared")]
    config = resolve(load_config("photos", flags))
    feature_rates = _rates({"ours": lambda: _our_features(config, files), "plain": lambda: _plain_features(files)}, rounds)
    print(f"features, images/s: {feature_rates}", flush=True)
    head = _heads(["--data.source.path", str(all_images.absolute()), *flags[2:], "--val_fraction", "0.3"], rounds)
    print(f"head: {head}", flush=True)
    full_rates = _rates({"ours": lambda: _our_steps(flags, steps), "plain": lambda: _plain_steps(config, files, steps)}, rounds)
    print(f"full fine-tuning, images/s: {full_rates}", flush=True)
    ratios = {
        "features_over_plain": feature_rates["ours"] / feature_rates["plain"],
        "head_over_sklearn": head["sklearn_seconds"] / head["seconds"],
        "full_over_timm": full_rates["ours"] / full_rates["plain"],
    }
    return {
        "features_images_per_s": feature_rates,
        "head": head,
        "full_images_per_s": full_rates,
        "seconds_to_table": {"first": round(first, 1), "second": round(second, 1)},
        "precision": config.train.precision,
        "ratios": {name: round(value, 2) for name, value in ratios.items()},
    }


def _rates(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Images a second of each side, which returns it: the best of some rounds, in turn."""
    found = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
    return {name: round(max(each[name] for each in found), 1) for name in sides}


def _thousand(given: Path | None, folder: Path) -> Path:
    """A folder with 800 training and 200 test images: links to every so-manieth given one, or crops of two photographs."""
    if given is not None:
        files = sorted((given.absolute() / "train").rglob("*.jpg"))
        if not files:
            raise UserError(f"--images {given}: no train/CLASS/*.jpg below it")
        by_class: dict[str, list[Path]] = {}
        for i in np.linspace(0, len(files) - 1, min(1000, len(files))).astype(int):
            by_class.setdefault(files[i].parent.name, []).append(files[i])
        for name, members in by_class.items():
            for number, file in enumerate(members):
                place = folder / ("test" if number % 5 == 4 else "train") / name
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number}.jpg").symlink_to(file)
        return folder
    from sklearn.datasets import load_sample_images

    photos, draw = load_sample_images().images, np.random.default_rng(0)
    for label in range(10):
        photo, corner = photos[label % 2], draw.integers(0, (240, 360))
        for number in range(100):
            y, x = np.clip(corner + draw.integers(-60, 61, 2), 0, (photo.shape[0] - 188, photo.shape[1] - 280))
            place = folder / ("test" if number % 5 == 4 else "train") / f"class {label}"
            place.mkdir(parents=True, exist_ok=True)
            crop = Image.fromarray(photo[y : y + 188, x : x + 280]).resize((420, 282), Image.Resampling.BICUBIC)
            crop.save(place / f"{number}.jpg", quality=90)
    return folder


def _seconds_to_table(images: Path, scratch: Path, name: str) -> float:
    """Seconds of the command of the README, from its start to its end."""
    command = [sys.executable, "-m", "cibl_ray.train", "photos", "--data.source.path", str(images), "--name", name]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--data.prepared", str(scratch / "prepared"), "--runs", str(scratch / "runs")],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - started


def _our_features(config: RunConfig, files: list[Path]) -> float:
    """From JPEG files, as a run does: written to .beton, read, computed and kept."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "images"
        for number, file in enumerate(files):
            place = root / "train" / f"class {number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.jpg").symlink_to(file.resolve())
        network, _ = config.network.backbone.build()
        source = config.data.source.model_copy(update={"path": root})
        update = {"source": source, "prepared": Path(scratch) / "prepared", "val_fraction": 0.1, "test_fraction": 0.0}
        data = config.data.model_copy(update=update)
        network = network.to(memory_format=torch.channels_last)
        started = time.perf_counter()
        prepared = ensure_prepared(data, 0)
        extractor = Extractor(network, "", data, config.loader, torch.device("cpu"), lambda line: None)
        computed = extractor.split(prepared, "train", config.train.precision == "bf16")
        return len(computed) / (time.perf_counter() - started)


class _Photos(torch.utils.data.Dataset[torch.Tensor]):
    """Files as timm's transforms give them."""

    def __init__(self, files: list[Path], train: bool) -> None:
        import timm

        options = timm.data.resolve_data_config({}, model=timm.create_model(MODEL, num_classes=0))
        more: dict[str, Any] = {"scale": (0.35, 1.0), "auto_augment": None, "color_jitter": 0.0} if train else {}
        self.files, self.transform = files, timm.data.create_transform(**options, is_training=train, **more)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        image: torch.Tensor = self.transform(Image.open(self.files[index]).convert("RGB"))
        return image


def _plain_features(files: list[Path]) -> float:
    """torch's DataLoader with two workers, and the network in eager mode, float32."""
    import timm

    network, photos = timm.create_model(MODEL, num_classes=0).eval(), _Photos(files, train=False)
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in torch.utils.data.DataLoader(photos, batch_size=32, num_workers=2):
            network(batch)
    return len(files) / (time.perf_counter() - started)


def _heads(flags: list[str], rounds: int) -> dict[str, Any]:
    """Seconds to the validation accuracy that scikit-learn's best C reaches, on features that are there."""
    from sklearn.linear_model import LogisticRegression

    config = resolve(load_config("photos", flags))
    data, fits = features(config), []
    for c in C:
        started = time.perf_counter()
        model = LogisticRegression(C=c, max_iter=500, class_weight="balanced").fit(*data["train"])
        fits.append((score_logistic(model, data["val"], data["counts"]).balanced, -(time.perf_counter() - started), c))
    target, _, c = max(fits)
    theirs, ours = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        LogisticRegression(C=c, max_iter=500, class_weight="balanced").fit(*data["train"])
        theirs.append(time.perf_counter() - started)
        ours.append(_our_head(config, target))
    seconds, reached = min(ours)
    images = {split: len(data[split][1]) for split in ("train", "val")}
    return {
        "seconds": round(seconds, 3),
        "sklearn_seconds": round(min(theirs), 3),
        "sklearn_validation": round(target, 4),
        "validation": round(reached, 4),
        "images": images,
    }


def _our_head(config: RunConfig, target: float) -> tuple[float, float]:
    """Seconds of training, evaluated after each epoch, until the accuracy is reached; and the accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, ensure_prepared(config.data, config.seed), Path(folder))
        started, reached = time.perf_counter(), 0.0
        for _ in range(config.train.epochs):
            trainer.train_epoch()
            scores = trainer.evaluate("val")
            reached = scores.balanced if scores is not None else 0.0
            if reached >= target:
                break
        return time.perf_counter() - started, reached


def _our_steps(flags: list[str], steps: int) -> float:
    """Images a second of full fine-tuning."""
    more = ["--tune", "full", "--batch_size", str(BATCH), "--optimizer.kind", "adamw", "--loss", "{kind: cross_entropy}"]
    config = resolve(load_config("photos", [*flags, *more]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, ensure_prepared(config.data, config.seed), Path(folder))
        trainer.network.train()
        batches = trainer.feeds[0].steps(0, 0)
        trainer.optimize([next(batches)])
        started = time.perf_counter()
        for _ in range(steps):
            trainer.optimize([next(batches)])
        seconds = time.perf_counter() - started
        del batches
        for loader in trainer.train_loaders:
            loader.close()
    return steps * BATCH / seconds


def _plain_steps(config: RunConfig, files: list[Path], steps: int) -> float:
    """The same of a plain PyTorch loop: timm's transforms, two workers, AdamW, the same precision."""
    import timm

    classes = len(ensure_prepared(config.data, config.seed).classes)
    network = timm.create_model(MODEL, num_classes=classes).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    chosen = (files * (1 + (steps + 1) * BATCH // len(files)))[: (steps + 1) * BATCH]
    started = 0.0
    for number, batch in enumerate(torch.utils.data.DataLoader(_Photos(chosen, train=True), batch_size=BATCH, num_workers=2)):
        if number == 1:  # the first step warms up
            started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            loss = nn.functional.cross_entropy(network(batch), torch.zeros(len(batch), dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps * BATCH / (time.perf_counter() - started)


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train,photos]'")
