"""A checkpoint's scores on its run's data or on an image folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cibl_ray.evaluation.confusion import image_names
from cibl_ray.evaluation.metrics import Scores, score
from cibl_ray.evaluation.predict import predict
from cibl_ray.evaluation.tail_shift import TailShift, choose_shift, shifted
from cibl_ray.hardware import resolve_here
from cibl_ray.run.checkpoint import Checkpoint
from cibl_ray.run.images import changed
from cibl_ray.run.shift import checked_shift
from pipelines.augment.recipe import Normalize
from pipelines.common.errors import UserError
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import eval_plan
from pipelines.prepare.build import ensure_prepared, prepare_folder
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Scores, the split that they were measured on, and what they were computed from.

    Attributes:
        split: The split.
        scores: Its scores.
        images: The names of its N images in their source; numbers where the names are gone.
        logits: Of each image, after the tail shift, float32 (N, C).
        labels: int64 (N,).
        tail_shift: The shift that was chosen on validation images; None where none was asked for.
    """

    split: str
    scores: Scores
    images: list[str]
    logits: torch.Tensor
    labels: torch.Tensor
    tail_shift: TailShift | None = None


def evaluate(
    checkpoint: Checkpoint,
    folder: Path | None = None,
    split: str | None = None,
    tail_shift: float | Literal["auto"] = 0.0,
    metric: str = "balanced",
) -> Evaluation:
    """Evaluate a checkpoint, on a GPU where there is one.

    The run's own data are prepared again if they are gone.

    Args:
        checkpoint: The checkpoint. Its network, classes and training counts decide.
        folder: An image folder, FOLDER/CLASS/*, with the class names of the run. None evaluates the run's own data.
        split: 'train', 'val' or 'test' of the run's data. None takes test, or val where there is no test split.
        tail_shift: Times log π is taken off the logits; "auto": as is best on the validation split.
        metric: The score by which "auto" chooses.

    Raises:
        UserError: The data have no such split, their classes are not those of the checkpoint, or `tail_shift` is out of range.
    """
    if tail_shift != "auto":
        checked_shift(tail_shift)
    network = checkpoint.network()
    config = resolve_here(checkpoint.config)
    device = torch.device(config.train.device)
    if folder is None:
        prepared = ensure_prepared(config.data, config.seed, settable=False)
        split = split or ("test" if "test" in prepared.splits else "val")
        if split not in prepared.splits:
            raise UserError(f"the run's data have no {split!r} split; there are: {', '.join(prepared.splits)}")
        if prepared.classes != checkpoint.classes:
            raise UserError("the data's classes are no longer those the checkpoint was trained on")
        if difference := changed(checkpoint, prepared, split):
            log.warning(difference)
    else:
        prepared, split = prepare_folder(folder.absolute(), checkpoint.classes, config.data), "test"

    def outputs(data: Prepared, of: str) -> tuple[torch.Tensor, torch.Tensor]:
        loader = make_loader(data, of, eval_plan(config.data, config.train.eval_batch_size), config.loader)
        try:
            return predict(network.to(device), loader, Normalize(config.data).to(device), device)
        finally:
            loader.close()

    chosen: TailShift | None = None
    if tail_shift == "auto":
        own = prepared if folder is None else ensure_prepared(config.data, config.seed, settable=False)
        if "val" not in own.splits:
            raise UserError("--tail-shift auto chooses on validation images, and the run's data have none; give a number")
        chosen = choose_shift(*outputs(own, "val"), checkpoint.train_counts, metric)
        tail_shift = chosen.shift
    logits, labels = outputs(prepared, split)
    logits = shifted(logits, checkpoint.train_counts, tail_shift)
    names = image_names(prepared, split, len(labels))
    return Evaluation(split, score(logits, labels, checkpoint.train_counts), names, logits, labels, chosen)
