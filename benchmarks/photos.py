"""`python -m benchmarks.photos FOLDER [--only table|speed] [--rows NAME ...]`: photographs, this project and its peers.

FOLDER is an image folder with train and test. `table` trains every row with several seeds and prints accuracy by class
frequency; `speed` measures feature extraction, heads and full fine-tuning against the plain way. The last line is JSON.

The peers are at their best on the same images, splits and features: scikit-learn's LogisticRegression, with C chosen on
validation data, and for speed a plain PyTorch loop with AdamW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cibl_ray.config import RunConfig, load_config
from cibl_ray.evaluation.metrics import Scores, score
from cibl_ray.features.extract import Extractor
from cibl_ray.hardware import describe, resolve
from cibl_ray.networks.config import Needs
from cibl_ray.networks.network import build_network
from cibl_ray.run.progress import Silent
from cibl_ray.training.fit import fit
from cibl_ray.world import World
from pipelines.common.errors import run_command
from pipelines.prepare.build import ensure_prepared

COLUMNS = ("overall", "balanced", "many", "medium", "few", "worst", "harmonic", "calibration_error")
_HEAD: dict[str, list[str]] = {
    "cross-entropy": ["--loss", "{kind: cross_entropy}"],
    "balanced softmax": [],
    "balanced softmax, cosine": ["--network.head", "{kind: cosine, scale: {start: 16}}"],
    "LDAM, cosine": ["--loss", "{kind: ldam}", "--network.head", "{kind: cosine}"],
    "CIBL": ["--loss", "{kind: cibl, tail_skew: .05, kappa: 1}", "--network.neck", "{hidden: 512}"],
    "CIBL, cosine": [
        *("--loss", "{kind: cibl, tail_skew: .05, kappa: 1}", "--network.neck", "{hidden: 512}"),
        *("--network.head", "{kind: cosine, scale: {start: 16}}"),
    ],
}
_TUNED = ["--optimizer", "{kind: adamw, lr: 5.0e-4, weight_decay: .05, layer_decay: .75}", "--warmup_epochs", "0.5"]
ROWS: dict[str, tuple[str, list[str]]] = {
    "scratch": ("folder", ["--epochs", "10", "--warmup_epochs", "1"]),
    **{f"head, {name}": ("photos", flags) for name, flags in _HEAD.items()},
    "partial": ("photos", ["--tune", "partial", "--epochs", "3", *_TUNED]),
    "full": ("photos", ["--tune", "full", "--epochs", "5", *_TUNED]),
}
PEERS = ("scikit-learn, plain", "scikit-learn, balanced")
_C = (0.01, 0.1, 1.0, 10.0, 100.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photos", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=["table", "speed"])
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *PEERS], help="of the table; by default all but scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prepared", type=Path, default=Path("prepared"))
    parser.add_argument("--images", type=int, default=256, help="that speed is measured on")
    arguments = parser.parse_args()
    flags = ["--data.source.path", str(arguments.folder.absolute()), "--data.prepared", str(arguments.prepared.absolute())]
    result: dict[str, Any] = {"hardware": describe("cpu")}
    if arguments.only != "speed":
        names = arguments.rows or [name for name in (*ROWS, *PEERS) if name != "scratch"]
        result["table"] = table(names, flags, arguments.seeds)
    if arguments.only != "table":
        result |= speed(flags, arguments.images)
    print(json.dumps(result))


def table(names: Sequence[str], flags: list[str], seeds: int) -> dict[str, Any]:
    """Train or fit every row with every seed. Returns mean and standard deviation of each column."""
    rows: dict[str, Any] = {}
    print(f"{'':30}" + "".join(f"{column[:10]:>13}" for column in (*COLUMNS, "seconds")))
    for name in names:
        found = []
        for seed in range(seeds):
            started = time.perf_counter()
            scores = peer(name, flags, seed) if name in PEERS else ours(name, flags, seed)
            found.append({**{c: getattr(scores, c) for c in COLUMNS}, "seconds": time.perf_counter() - started})
        rows[name] = {
            column: [f([100 * row[column] if column != "seconds" else row[column] for row in found]) for f in (_mean, _spread)]
            for column in (*COLUMNS, "seconds")
        }
        print(f"{name:30}" + "".join(f"{mean:7.1f} ±{spread:4.1f}" for mean, spread in rows[name].values()), flush=True)
    return rows


def ours(name: str, flags: list[str], seed: int) -> Scores:
    """One run of this project, scored on the test images by the epoch that is best on validation."""
    config_name, more = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(config_name, [*flags, "--seed", str(seed), *more])
        result = fit(config, Path(folder) / "run", False, World(), Silent())
    return Scores(**result["best"]["scores"])


def peer(name: str, flags: list[str], seed: int) -> Scores:
    """scikit-learn on the same features: standardised or not, C and that chosen on the validation images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    config = resolve(load_config("photos", [*flags, "--seed", str(seed)]))
    data = features(config)
    best: tuple[float, Any] = (-1.0, None)
    for scaled in (False, True):
        for c in _C:
            model = LogisticRegression(C=c, max_iter=500, class_weight="balanced" if "balanced" in name else None)
            pipeline = make_pipeline(StandardScaler(), model) if scaled else model
            pipeline.fit(*data["train"])
            on_val = _score(pipeline, data["val"], data["counts"]).balanced
            if on_val > best[0]:
                best = on_val, pipeline
    return _score(best[1], data["test"], data["counts"])


def _score(model: Any, split: tuple[np.ndarray, np.ndarray], counts: np.ndarray) -> Scores:
    logits = torch.from_numpy(np.log(np.clip(model.predict_proba(split[0]), 1e-12, 1))).float()
    return score(logits, torch.from_numpy(split[1].astype(np.int64)), counts)


def features(config: RunConfig) -> dict[str, Any]:
    """(features, labels) of each split, and the training counts."""
    prepared = ensure_prepared(config.data, config.seed)
    network = build_network(config.network, len(prepared.classes), Needs(), config.seed, pretrained=True)
    title = config.network.backbone.title
    extractor = Extractor(network.backbone, title, config.data, config.loader, torch.device("cpu"), lambda line: None)
    splits: dict[str, Any] = {"counts": prepared.train_counts}
    for split in prepared.splits:
        bf16 = split == "train" and config.train.precision == "bf16"
        splits[split] = extractor.split(prepared, split, bf16)[:, 0].numpy(), np.array(prepared.beton(split).labels)
    return splits


def speed(flags: list[str], images: int) -> dict[str, Any]:
    """Images a second of features and of full fine-tuning, and seconds of a head, against the plain way of each."""
    config = resolve(load_config("photos", flags))
    files = sorted(Path(flags[1]).joinpath("train").rglob("*.jpg"))
    files = [files[i] for i in np.linspace(0, len(files) - 1, images).astype(int)]
    plain, mine = _turns(lambda: _plain_features(config, files), lambda: _our_features(config, files))
    ratios = {"features_over_plain": plain / mine}
    print(f"features: {images / mine:.1f} images/s, plain {images / plain:.1f}, ratio {plain / mine:.2f}", flush=True)
    data = features(config)
    peer_seconds, target = _sklearn_head(data)
    own_seconds = _our_head(flags, target)
    ratios["head_over_sklearn"] = peer_seconds / own_seconds
    print(f"head to {100 * target:.1f} % on validation: {own_seconds:.2f} s, scikit-learn {peer_seconds:.2f} s", flush=True)
    plain, mine = _turns(lambda: _plain_steps(config), lambda: _our_steps(flags))
    ratios["full_over_timm"] = plain / mine
    print(f"full fine-tuning: {1 / mine:.1f} images/s, plain {1 / plain:.1f}, ratio {plain / mine:.2f}")
    return {"ratios": {name: round(value, 2) for name, value in ratios.items()}}


def _turns(*ways: Callable[[], float], turns: int = 3) -> list[float]:
    """Seconds of each way: the least of some turns, one after the other, so that a busy machine is busy for all."""
    found = [[way() for way in ways] for _ in range(turns)]
    return [min(column) for column in zip(*found, strict=True)]


def _plain_features(config: RunConfig, files: list[Path]) -> float:
    """torchvision's DataLoader with two workers and the network in torch's eager mode."""
    import timm
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))

    class Photos(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> torch.Tensor:
            image: torch.Tensor = transform(Image.open(files[index]).convert("RGB"))
            return image

    started = time.perf_counter()
    with torch.inference_mode():
        for batch in DataLoader(Photos(), batch_size=32, num_workers=2):
            network(batch)
    return time.perf_counter() - started


def _our_features(config: RunConfig, files: list[Path]) -> float:
    """From the same JPEG files, as a run does: written to .beton, read, and computed."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "images"
        for number, file in enumerate(files):
            for split in ("train", *(("test",) if number < 2 else ())):
                place = root / split / f"class {number % 2}"
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number}.jpg").symlink_to(file)
        network, _ = config.network.backbone.build()
        source = config.data.source.model_copy(update={"path": root})
        data = config.data.model_copy(update={"source": source, "prepared": Path(scratch) / "prepared", "val_fraction": 0.0})
        started = time.perf_counter()
        prepared = ensure_prepared(data, 0)
        network = network.to(memory_format=torch.channels_last)
        extractor = Extractor(network, "", data, config.loader, torch.device("cpu"), lambda line: None)
        extractor.split(prepared, "train", config.train.precision == "bf16")
        return time.perf_counter() - started


def _sklearn_head(data: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a fit with the best C, and the balanced accuracy on validation images that it reaches."""
    from sklearn.linear_model import LogisticRegression

    found = []
    for c in _C:
        started = time.perf_counter()
        model = LogisticRegression(C=c, max_iter=500, class_weight="balanced").fit(*data["train"])
        found.append((_score(model, data["val"], data["counts"]).balanced, -(time.perf_counter() - started)))
    target, seconds = max(found)
    return -seconds, target


def _our_head(flags: list[str], target: float) -> float:
    """Seconds of training until the validation accuracy is reached; the features are there."""
    from cibl_ray.training.trainer import Trainer

    config = resolve(load_config("photos", flags))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, ensure_prepared(config.data, config.seed), Path(folder))
        started = time.perf_counter()
        for _ in range(config.train.epochs):
            trainer.train_epoch()
            scores = trainer.evaluate("val")
            if scores is not None and scores.balanced >= target:
                break
        return time.perf_counter() - started


def _our_steps(flags: list[str]) -> float:
    """Seconds an image of full fine-tuning."""
    from cibl_ray.training.trainer import Trainer

    config = resolve(load_config("photos", [*flags, "--tune", "full", "--batch_size", "32", "--optimizer.kind", "adamw"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, ensure_prepared(config.data, config.seed), Path(folder))
        trainer.network.train()
        steps = trainer.feeds[0].steps(0, 0)
        trainer.optimize([next(steps)])
        started = time.perf_counter()
        for _ in range(4):
            trainer.optimize([next(steps)])
        seconds = (time.perf_counter() - started) / (4 * 32)
        del steps
        for loader in trainer.train_loaders:
            loader.close()
    return seconds


def _plain_steps(config: RunConfig) -> float:
    """The same of a plain PyTorch loop: timm's transforms, two workers, AdamW, the same precision."""
    import timm
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    source: Any = config.data.source
    files = sorted((source.path / "train").rglob("*.jpg"))[: 6 * 32]
    network = timm.create_model("tf_efficientnet_lite0", num_classes=26).train()
    options = timm.data.resolve_data_config({}, model=network)
    transform = timm.data.create_transform(**options, is_training=True, scale=(0.35, 1.0), auto_augment=None, color_jitter=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    class Photos(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> torch.Tensor:
            image: torch.Tensor = transform(Image.open(files[index]).convert("RGB"))
            return image

    seconds = 0.0
    before = None
    for batch in DataLoader(Photos(), batch_size=32, num_workers=2, drop_last=True):
        if before is None:
            before = time.perf_counter()
            seconds = -1
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            loss = nn.functional.cross_entropy(network(batch), torch.zeros(len(batch), dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if seconds < 0:  # the first step warms up
            seconds, before = 0.0, time.perf_counter()
    assert before is not None
    return (time.perf_counter() - before) / (5 * 32)


def _mean(values: list[float]) -> float:
    return round(statistics.mean(values), 2)


def _spread(values: list[float]) -> float:
    return round(statistics.stdev(values), 2) if len(values) > 1 else 0.0


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train,photos]'")
