"""The comparison on photographs: this project's heads and fine-tuning, and what else one would do with the same backbone.

Every row and seed is a line of JSON in a file. What is there is not trained again, so that a stopped comparison continues.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.measure import machine
from cibl_ray.config import RunConfig, load_config
from cibl_ray.evaluation.metrics import Scores, score
from cibl_ray.evaluation.predict import predict
from cibl_ray.features.extract import Extractor
from cibl_ray.hardware import resolve
from cibl_ray.networks.config import Needs
from cibl_ray.networks.network import build_network
from cibl_ray.run.progress import Silent
from cibl_ray.training.fit import fit
from cibl_ray.world import World
from pipelines.augment.recipe import Normalize
from pipelines.common.files import write_atomically
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import eval_plan
from pipelines.prepare.build import ensure_prepared

COLUMNS = ("overall", "balanced", "many", "medium", "few", "worst", "harmonic", "calibration_error")
_LOSSES = {
    "cross-entropy": "{kind: cross_entropy}",
    "balanced softmax": "{kind: balanced_softmax}",
    "VS": "{kind: vs}",
    "CIBL": "{kind: cibl, tail_skew: .05, kappa: 1}",
}
_HEADS = {"linear": "{kind: linear}", "cosine": "{kind: cosine, scale: {start: 20}}"}
_NECK = ("--network.neck", "{hidden: 512}")  # what a contrastive loss shapes where the backbone is frozen
# Every row: the configuration, and its options.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    f"head, {loss}, {head}": ("photos", ("--loss", option, "--network.head", of_head, *(_NECK if loss == "CIBL" else ())))
    for loss, option in _LOSSES.items()
    for head, of_head in _HEADS.items()
}
ROWS |= {
    "partial, last two stages": ("photos", ("--tune", "partial")),
    "partial, adapters": ("photos", ("--tune", "partial", "--train.partial", "{kind: adapters}")),
    "full": ("photos", ("--tune", "full")),
    "from scratch, ResNet-32 at 64 pixels": ("folder", ("--epochs", "10", "--warmup_epochs", "1")),
}
SKLEARN, SKLEARN_BALANCED = "scikit-learn, plain", "scikit-learn, balanced"
LOOP = "PyTorch loop, AdamW, weighted sampler"
NAMES = (*ROWS, SKLEARN, SKLEARN_BALANCED, LOOP)
QUICK = tuple(name for name in NAMES if name.startswith(("head", "scikit")))
C = (0.01, 0.1, 1.0, 10.0, 100.0)


def make_table(folder: Path, prepared: Path, names: Sequence[str], seeds: int, lines: Path) -> str:
    """Train or fit every row with every seed that `lines` lacks.

    Args:
        folder: Images, with a test split.
        prepared: Folder of the prepared data and features.
        names: Of the rows.
        seeds: How many of each.
        lines: The JSON lines.

    Returns:
        The table, in Markdown, of what the lines hold.
    """
    found = read_lines(lines)
    flags = ["--data.source.path", str(folder.absolute()), "--data.prepared", str(prepared.absolute())]
    for seed in range(seeds):
        for name in names:
            if any(line["row"] == name and line["seed"] == seed for line in found):
                continue
            run = lines.with_suffix(".runs") / f"{name.replace(' ', '-')}-{seed}"
            scores, seconds, command = _row(name, flags, seed, run)
            numbers = {column: getattr(scores, column) for column in COLUMNS}
            line = {"row": name, "seed": seed, **numbers, "seconds": round(seconds, 2), "command": command}
            found.append({**line, "machine": machine()})
            write_atomically(lines, "".join(json.dumps(each) + "\n" for each in found))
            print(f"{name:40}{seed:3}  balanced {100 * scores.balanced:.1f}, {seconds:.1f} s", flush=True)
    return markdown(found)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """A table of means and standard deviations over the seeds, in percent; seconds are medians."""
    columns = [column.replace("calibration_error", "calibration error") for column in COLUMNS]
    text = [f"| | {' | '.join(columns)} | seconds | seeds |", f"|---|{'---|' * (len(columns) + 2)}"]
    for name in [name for name in NAMES if any(line["row"] == name for line in lines)]:
        rows = [line for line in lines if line["row"] == name]
        cells = [_cell([row[column] for row in rows]) for column in COLUMNS]
        seconds = statistics.median(row["seconds"] for row in rows)
        text.append(f"| {name} | {' | '.join(cells)} | {seconds:.3g} | {len(rows)} |")
    return "\n".join(text)


def _cell(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def _row(name: str, flags: list[str], seed: int, run: Path) -> tuple[Scores, float, str]:
    """Scores on the test split, seconds of the training, and the command where there is one. A stopped run continues."""
    if name not in ROWS:
        config = resolve(load_config("photos", [*flags, "--seed", str(seed)]))
        scores, seconds = train_loop(config) if name == LOOP else _logistic(config, balanced=name == SKLEARN_BALANCED)
        return scores, seconds, ""
    config_name, options = ROWS[name]
    given = [*options, "--seed", str(seed)]
    config = load_config(config_name, [*flags, *given, "--checkpoint_minutes", "2"])
    result = fit(config, run, run.exists(), World(), Silent())
    shutil.rmtree(run)
    command = f"python -m cibl_ray.train {config_name} --data.source.path FOLDER {shlex.join(given)}"
    return Scores(**result["last"]["scores"]), result["seconds"], command


def _logistic(config: RunConfig, balanced: bool) -> tuple[Scores, float]:
    """scikit-learn on the same features. C, and whether they are standardised, are the best on the validation images."""
    data = features(config)
    _, seconds, model = fit_logistic(data, balanced)
    return score_logistic(model, data["test"], data["counts"]), seconds


def fit_logistic(data: dict[str, Any], balanced: bool) -> tuple[float, float, Any]:
    """The logistic regression that is best on validation: its balanced accuracy there, its seconds, and itself."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = []
    for scaled in (False, True):
        for c in C:
            model = LogisticRegression(C=c, max_iter=500, class_weight="balanced" if balanced else None)
            pipeline = make_pipeline(StandardScaler(), model) if scaled else model
            started = time.perf_counter()
            pipeline.fit(*data["train"])
            seconds = time.perf_counter() - started
            found.append((score_logistic(pipeline, data["val"], data["counts"]).balanced, seconds, pipeline))
    return max(found, key=lambda each: (each[0], -each[1]))


def score_logistic(model: Any, split: tuple[np.ndarray, np.ndarray], counts: np.ndarray) -> Scores:
    """Scores of scikit-learn's probabilities, as of logits."""
    logits = torch.from_numpy(np.log(np.clip(model.predict_proba(split[0]), 1e-12, 1))).float()
    return score(logits, torch.from_numpy(split[1].astype(np.int64)), counts)


def features(config: RunConfig) -> dict[str, Any]:
    """(features, labels) of each split, as a run with a frozen backbone has them, and the training counts."""
    prepared = ensure_prepared(config.data, config.seed)
    network = build_network(config.network, len(prepared.classes), Needs(), config.seed, pretrained=True)
    title = config.network.backbone.title
    extractor = Extractor(network.backbone, title, config.data, config.loader, torch.device("cpu"), lambda line: None)
    splits: dict[str, Any] = {"counts": prepared.train_counts}
    for split in prepared.splits:
        bf16 = split == "train" and config.train.precision == "bf16"
        splits[split] = extractor.split(prepared, split, bf16)[:, 0].numpy(), np.array(prepared.beton(split).labels)
    return splits


def train_loop(config: RunConfig, epochs: int = 3, batch_size: int = 16, lr: float = 3e-4) -> tuple[Scores, float]:
    """What one would write by hand: the same network and images, AdamW with a cosine, a sampler that shows classes alike.

    The test images are those of this project's evaluation. The learning rate is the best of 1e-4, 3e-4 and 1e-3 on the test
    images of caltech-lt with seed 0, a choice that favours it.
    """
    import timm
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

    prepared = ensure_prepared(config.data, config.seed)
    torch.manual_seed(config.seed)
    network = build_network(config.network, len(prepared.classes), Needs(), config.seed, pretrained=True)
    options = timm.data.resolve_data_config({}, model=network.backbone)
    transform = timm.data.create_transform(**options, is_training=True, scale=(0.35, 1.0), auto_augment=None, color_jitter=0.0)
    source: Any = config.data.source
    names = (prepared.folder / "train.files.txt").read_text().splitlines()
    labels = prepared.beton("train").labels.astype(np.int64)

    class Photos(Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(names)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return transform(Image.open(source.path / names[index]).convert("RGB")), int(labels[index])

    weights = (1 / prepared.train_counts)[labels]
    sampler = WeightedRandomSampler(weights.tolist(), len(names))
    loader = DataLoader(Photos(), batch_size=batch_size, sampler=sampler, num_workers=2, drop_last=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(loader), pct_start=0.5 / epochs)
    started = time.perf_counter()
    for _ in range(epochs):
        network.train()
        for images, targets in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
                loss = nn.functional.cross_entropy(
                    network(images.contiguous(memory_format=torch.channels_last)).logits, targets
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - started
    test = make_loader(prepared, "test", eval_plan(config.data, 64), config.loader)
    answers, truth = predict(network, test, Normalize(config.data), torch.device("cpu"))
    test.close()
    return score(answers, truth, prepared.train_counts), seconds
