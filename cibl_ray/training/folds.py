"""Cross-validation of a head: several heads on cached features, each scored on images that it was not trained on."""

from __future__ import annotations

import logging
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cibl_ray.config import RunConfig
from cibl_ray.evaluation.metrics import Scores, score
from cibl_ray.evaluation.predict import predict
from cibl_ray.evaluation.tail_shift import FEW, TailShift, choose_shift
from cibl_ray.features.folds import FoldFeatures, fold_numbers, fold_rows
from cibl_ray.training.trainer import Trainer
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)

_AUTO = 5  # heads of train.folds 'auto'


@dataclass(frozen=True)
class CrossValidated:
    """What cross-validation found.

    Attributes:
        pooled: The scores of all held-out images together, each by the one head that was not trained on it.
        of_each: The scores of each fold.
        shift: The tail shift that the held-out images chose.
    """

    pooled: Scores
    of_each: list[Scores]
    shift: TailShift

    def dump(self) -> dict[str, Any]:
        """The scores as JSON, for result.json: the pooled ones, and the standard deviation over the folds."""
        names = [name for name in self.pooled.numbers() if all(name in fold.numbers() for fold in self.of_each)]
        spread = {name: statistics.stdev(fold.numbers()[name] for fold in self.of_each) for name in names}
        return {"count": len(self.of_each), "scores": asdict(self.pooled), "spread": spread, "tail_shift": self.shift.dump()}


def folds_of(config: RunConfig, prepared: Prepared) -> int:
    """How many folds a run has: as configured, or with 'auto' five where a validation split is too small to choose by.

    Args:
        config: The run's configuration.
        prepared: The images.

    Returns:
        The number of folds; 0 for no cross-validation. With 'auto' none where a run starts from another one (train.start),
        whose head has seen the images of every fold.

    Raises:
        UserError: The folds that are asked for cannot be made.
    """
    folds = config.train.folds
    if folds != "auto":
        if folds and config.train.start is not None:
            raise UserError(
                f"train.folds {folds} with train.start: the head there has seen the images of every fold; leave one of them out"
            )
        if folds and max(prepared.train_counts) < 2:
            raise UserError(f"train.folds {folds}: no class has two training images, so no image can be held out; set 0")
        return folds
    if config.train.tune != "head" or config.train.start is not None or max(prepared.train_counts) < 2:
        return 0
    return 0 if "val" in prepared.splits and not few_validation_images(prepared) else _AUTO


def few_validation_images(prepared: Prepared) -> int:
    """How many classes have fewer than three validation images, where one decides a class's accuracy or half of it."""
    counts = prepared.splits["val"].counts if "val" in prepared.splits else []
    return sum(0 < count < FEW for count in counts)


def cross_validate(trainer: Trainer, count: int) -> CrossValidated:
    """Train a head of each fold as the run's own was trained, and score it on the images that the fold holds out.

    Args:
        trainer: Of the run, whose features are used.
        count: How many folds.

    Returns:
        The scores.
    """
    assert trainer.features is not None
    # Nothing of a fold is kept, so it has no checkpoints.
    config, prepared = trainer.config.with_train(checkpoint_minutes=None), trainer.prepared
    features, labels = trainer.features.features("train"), trainer.features.labels("train")
    weights = trainer.features.weights("train")
    of_each, logits, truth = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for rows, held_out in fold_rows(fold_numbers(labels, count, config.seed)):
            of_fold = FoldFeatures(features, labels, rows, held_out, trainer.device, weights)
            part = prepared.part({"train": labels[rows], "val": labels[held_out]})
            fold = Trainer(config, part, Path(scratch), World(alone=True), features=of_fold)  # on rank 0 alone
            for _ in range(config.train.epochs):
                fold.train_epoch()
            answers, right = predict(fold.judged, fold.evaluator.loaders["val"], fold.normalize, trainer.device)
            of_each.append(score(answers, right, prepared.train_counts))
            logits.append(answers)
            truth.append(right)
    joined = torch.cat(logits), torch.cat(truth)
    found = CrossValidated(score(*joined, prepared.train_counts), of_each, choose_shift(*joined, prepared.train_counts))
    left_out = int((np.bincount(labels) == 1).sum())
    if left_out:
        log.info("cross-validation leaves out %d classes of one training image", left_out)
    return found
