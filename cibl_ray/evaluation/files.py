"""Predictions for image files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cibl_ray.hardware import resolve
from cibl_ray.run.checkpoint import Checkpoint
from pipelines.augment.recipe import Normalize
from pipelines.common.errors import UserError
from pipelines.library_warnings import collected_warnings
from pipelines.loaders.reading import eval_rule
from pipelines.pixels import BadImageError, EvalRule, decode

log = logging.getLogger(__name__)

_AT_ONCE = 64  # images


@dataclass(frozen=True)
class Prediction:
    """What a network makes of one image.

    Attributes:
        image: The image file.
        label: The most probable class.
        probability: Its probability, from 0 to 1.
        probabilities: The probability of each class, in the order of the run's classes.
    """

    image: Path
    label: str
    probability: float
    probabilities: dict[str, float] = field(repr=False)


@torch.inference_mode()
def predict_files(checkpoint: Checkpoint, images: list[Path]) -> list[Prediction]:
    """Classify image files as evaluation and the server would, on a GPU where there is one.

    Args:
        checkpoint: The checkpoint.
        images: Image files.

    Returns:
        A prediction for each file, in the same order.

    Raises:
        UserError: A file cannot be read, or is not an image.
    """
    train = checkpoint.config.train.model_copy(update={"device": "auto"})
    config = resolve(checkpoint.config.model_copy(update={"train": train}))
    device, rule, classes = torch.device(config.train.device), eval_rule(config.data), checkpoint.classes
    network, normalize = checkpoint.network().eval().to(device), Normalize(config.data).to(device)
    predictions = []
    for start in range(0, len(images), _AT_ONCE):
        files = images[start : start + _AT_ONCE]
        with collected_warnings() as warned:
            pixels = np.stack([_pixels(file, rule, warned.begin) for file in files])
        if text := warned.text():
            log.warning(text)
        logits = network.classify(normalize(torch.from_numpy(pixels)[:, None].to(device)))
        for file, row in zip(files, logits.softmax(1).tolist(), strict=True):
            best = max(range(len(classes)), key=row.__getitem__)
            predictions.append(Prediction(file, classes[best], row[best], dict(zip(classes, row, strict=True))))
    return predictions


def _pixels(file: Path, rule: EvalRule, begin: Callable[[str], None]) -> np.ndarray:
    """uint8 (S, S, 3)."""
    begin(str(file))
    try:
        return rule(decode(file.read_bytes()))
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    except BadImageError as error:
        raise UserError(f"{str(file)!r} is not an image that can be read: {error}") from error
