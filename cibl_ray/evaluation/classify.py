"""Image files to classes, by a run's checkpoint or by a bundle, without a service."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cibl_ray.run.shift import checked_shift
from pipelines.common.cores import usable_cores
from pipelines.common.errors import UserError
from pipelines.formats import readable_suffixes
from pipelines.image_files import LeftOut
from pipelines.image_files import image_files as below
from pipelines.pixels import MAX_PIXELS, BadImageError, EvalRule, damage_told, decode

if TYPE_CHECKING:
    from cibl_ray.run.checkpoint import Checkpoint

_AT_ONCE = 32  # images
_loading = Lock()


@dataclass(frozen=True)
class Classifier:
    """What classifies, whatever it came from.

    Attributes:
        classes: In the order of the probabilities.
        rule: What it is shown of an image.
        probabilities: uint8 (N, S, S, 3) to float32 (N, C).
        max_pixels: Of an image; larger ones are refused.
    """

    classes: list[str]
    rule: EvalRule
    probabilities: Callable[[np.ndarray], np.ndarray]
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Prediction:
    """What a network makes of one image.

    Attributes:
        image: The image file, or the image where one was given.
        label: The most probable class.
        probability: Its probability, from 0 to 1.
        probabilities: The probability of each class, in the order of the run's classes.
    """

    image: Path | Image.Image
    label: str
    probability: float
    probabilities: dict[str, float] = field(repr=False)


@dataclass(frozen=True)
class Unreadable:
    """A file that cannot be classified.

    Attributes:
        image: The file, or the image where one was given.
        problem: Why.
        too_large: Whether it has more than `Classifier.max_pixels`.
    """

    image: Path | Image.Image
    problem: str
    too_large: bool = False


def from_bundle(folder: Path) -> Classifier:
    """A bundle's float32 model, run by onnxruntime.

    Args:
        folder: The bundle.

    Raises:
        UserError: The folder is not a whole bundle.
    """
    from cibl_ray.bundle.card import PROBABILITIES, open_bundle
    from cibl_ray.bundle.runtime import Runtime

    bundle = open_bundle(folder)
    runtime = Runtime(bundle.models["fp32"].path)

    def probabilities(images: np.ndarray) -> np.ndarray:
        (values,) = runtime(images, outputs=(PROBABILITIES,))
        return values

    return Classifier(bundle.card.classes, bundle.card.rule, probabilities)


def from_checkpoint(checkpoint: Checkpoint, tail_shift: float) -> Classifier:
    """A checkpoint's network, on a GPU where there is one.

    Args:
        checkpoint: The checkpoint.
        tail_shift: This times log π is subtracted from the logits.

    Raises:
        UserError: The shift is out of range, or the checkpoint is of another architecture.
    """
    import torch

    from cibl_ray.evaluation.tail_shift import shifted
    from cibl_ray.hardware import resolve_here
    from pipelines.augment.recipe import Normalize
    from pipelines.loaders.reading import eval_rule

    checked_shift(tail_shift)
    config = resolve_here(checkpoint.config)
    device = torch.device(config.train.device)
    network, normalize = checkpoint.network().eval().to(device), Normalize(config.data).to(device)

    @torch.inference_mode()
    def probabilities(images: np.ndarray) -> np.ndarray:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False
        ):  # as evaluation
            logits = network.classify(normalize(torch.from_numpy(images)[:, None].to(device))).cpu()
        values: np.ndarray = shifted(logits, checkpoint.train_counts, tail_shift).softmax(1).numpy()
        return values

    return Classifier(checkpoint.classes, eval_rule(config.data), probabilities, config.data.max_pixels)


def image_files(places: Sequence[Path]) -> list[Path]:
    """List images.

    Args:
        places: Files, and folders.

    Returns:
        The files, and all images below the folders, sorted within each folder. What is left out of a folder is reported on
        standard error, as by `python -m pipelines.prepare`.

    Raises:
        UserError: A place does not exist, or there is no image.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            left_out = LeftOut()
            found += [place / name for name in below(place, left_out)]
            left_out.tell(place, before="")
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{str(place)!r} does not exist; give image files, or folders of them")
    if not found:
        raise UserError(f"no images in {', '.join(map(repr, map(str, places)))} ({', '.join(readable_suffixes())})")
    return found


def classify(
    classifier: Classifier, files: Sequence[Path | Image.Image], begin: Callable[[str], None] = lambda image: None
) -> Iterator[Prediction | Unreadable]:
    """Classify images as evaluation and the service would, in order.

    Args:
        classifier: What classifies.
        files: Image files, and images of any mode.
        begin: Called with each before it is decoded, in the thread that decodes it.

    Yields:
        One answer for each.
    """
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(files), _AT_ONCE):
            some = files[start : start + _AT_ONCE]
            read = list(pool.map(lambda file: _read(file, classifier, begin), some))
            images = [image for image in read if isinstance(image, np.ndarray)]
            rows = iter(classifier.probabilities(np.stack(images)).tolist() if images else [])
            for file, image in zip(some, read, strict=True):
                if isinstance(image, Unreadable):
                    yield image
                    continue
                row = next(rows)
                best = max(range(len(row)), key=row.__getitem__)
                yield Prediction(file, classifier.classes[best], row[best], dict(zip(classifier.classes, row, strict=True)))


def _read(file: Path | Image.Image, classifier: Classifier, begin: Callable[[str], None]) -> np.ndarray | Unreadable:
    """uint8 (S, S, 3), or why there is none."""
    begin(str(file))
    try:
        if isinstance(file, Image.Image):
            with _loading:  # one image may be in the list twice
                file.load()
            return classifier.rule(file)
        data = file.read_bytes()
        with damage_told(data):
            return classifier.rule(decode(data, max_pixels=classifier.max_pixels, max_scans=None))
    except OSError as error:
        return Unreadable(file, f"cannot be read: {error.strerror or error}")
    except BadImageError as error:
        if error.setting.startswith("data.max_pixels"):
            return Unreadable(file, f"is too large: {error}", too_large=True)
        return Unreadable(file, f"is not an image that can be read: {error}")
