"""A model in a Python program: `Model(SOURCE).predict(IMAGES)`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cibl_ray.bundle.card import MANIFEST, MAX_SHIFT, PROBABILITIES, Card, open_bundle
from pipelines.common.errors import UserError, shown
from pipelines.pixels import MAX_PIXELS, BadImageError
from serve.decode import top
from serve.edge.download import download
from serve.edge.model import Edge

Picture = str | os.PathLike[str] | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class Answer:
    """What the model says of one image.

    Attributes:
        top: The most likely classes, most likely first: label, probability, group, index.
        problem: Why there is no answer; None if there is one.
    """

    top: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None

    @property
    def label(self) -> str | None:
        """The most likely class; None without an answer."""
        return str(self.top[0]["label"]) if self.top else None

    @property
    def probability(self) -> float | None:
        """The probability of `label`, 0 to 1; None without an answer."""
        return float(self.top[0]["probability"]) if self.top else None


class Model:
    """A model from a service, a bundle's folder, or an ONNX file.

    Attributes:
        card: Its classes, their training counts and groups, and its measured accuracy.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        name: str | None = None,
        precision: str | None = None,
        key: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Load the model. A service is asked once; its model is kept in the cache.

        Args:
            source: A service's URL, the folder of a bundle, or an .onnx file.
            name: Which model, if the service has several.
            precision: "fp32", "fp16" or "int8"; None: "fp32", or what an .onnx file has.
            key: API key of the service; None: CIBL_RAY_API_KEY in the environment.
            cache: Folder for downloaded models; None: `default_cache()`.
            threads: Threads of onnxruntime; None: all cores.
            max_pixels: Of an image file; larger ones are not answered.

        Raises:
            UserError: There is no such model, it has another precision, or it cannot be loaded.
        """
        key = os.environ.get("CIBL_RAY_API_KEY") if key is None else key
        file = local_file(source, precision, name)
        if file is None:
            file = download(str(source), Path(cache) if cache else default_cache(), name, precision, key)
        self._edge = Edge(file, threads, max_pixels, precision)

    @property
    def card(self) -> Card:
        """What the model's file says of itself."""
        return self._edge.card

    def predict(self, images: Iterable[Picture], *, k: int = 5, tail_shift: float = 0.0, batch: int = 32) -> list[Answer]:
        """Classify images.

        Args:
            images: Paths, contents of image files as bytes, Pillow images, or arrays: uint8 (H, W, 3) in RGB, or (H, W) gray.
            k: Classes of each answer, 1 or more.
            tail_shift: More of it favours rare classes: logits - tail_shift * log prior. -100 to 100.
            batch: Images in one call of onnxruntime, 1 or more.

        Returns:
            An answer for each image, in order. A bad image has a `problem`, and the others are answered.

        Raises:
            UserError: k, tail_shift or batch is out of range or no number, or `images` is one image.
        """
        if not (_is_number(k, Integral) and _is_number(batch, Integral)) or k < 1 or batch < 1:
            raise UserError(f"k={shown(k)}, batch={shown(batch)}: both must be whole numbers of 1 or more")
        if not _is_number(tail_shift, Real) or not abs(tail_shift) <= MAX_SHIFT:  # false for NaN, too
            raise UserError(f"tail_shift={shown(tail_shift)} is not a number from {-MAX_SHIFT:g} to {MAX_SHIFT:g}")
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)) or (
            isinstance(images, np.ndarray) and _is_picture(images)
        ):
            raise UserError(f"images is one image ({type(images).__name__}); give a list: predict([IMAGE])")
        answers: list[Answer] = []
        waiting: list[tuple[int, np.ndarray]] = []
        for image in images:
            try:
                waiting.append((len(answers), self._pixels(image)))
                answers.append(Answer())
            except (BadImageError, OSError) as error:
                answers.append(Answer(problem=str(error)))
            if len(waiting) == batch:
                self._answer(waiting, answers, k, tail_shift)
        if waiting:
            self._answer(waiting, answers, k, tail_shift)
        return answers

    def _pixels(self, image: Picture) -> np.ndarray:
        """uint8 (S, S, 3). Raises BadImageError, OSError."""
        if isinstance(image, bytes):
            return self._edge.pixels(image)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or not image.size or not _is_picture(image):
                raise BadImageError(f"an array of {image.dtype} {image.shape}; give uint8 (H, W, 3) or (H, W)")
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            try:
                return self.card.rule(image)
            except (BadImageError, OSError, MemoryError):
                raise
            except Exception as error:  # as from a file: it may not be loaded yet
                size = f"{image.width}x{image.height}"
                raise BadImageError(f"a Pillow image of mode {image.mode}, {size} pixels: {error}; give it in RGB") from error
        try:
            return self._edge.pixels(Path(image).read_bytes())
        except BadImageError:
            raise
        except ValueError as error:  # no path can have a null character
            raise BadImageError(f"{str(image)!r}: {error}; give the path of a file") from error

    def _answer(self, waiting: list[tuple[int, np.ndarray]], answers: list[Answer], k: int, tail_shift: float) -> None:
        """Fill in the answers of the images that wait."""
        shift = np.array([tail_shift], np.float32) if tail_shift else None
        (probabilities,) = self._edge.runtime(np.stack([pixels for _, pixels in waiting]), shift, (PROBABILITIES,))
        for (place, _), row in zip(waiting, probabilities, strict=True):
            answers[place] = Answer(top(self.card, row, k))
        waiting.clear()


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_picture(array: np.ndarray) -> bool:
    """Whether the shape is that of one image. A stack of images has four axes."""
    return array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))


def local_file(source: str | os.PathLike[str], precision: str | None = None, name: str | None = None) -> Path | None:
    """Find a model on this machine.

    Args:
        source: A file, the folder of a bundle, or something else.
        precision: Which of a bundle's models; None: fp32.
        name: Which model of a service. A file or a bundle is one model.

    Returns:
        The ONNX file; None if `source` is neither a file nor a folder.

    Raises:
        UserError: The folder is no bundle, or lacks the precision; or a name is given with a file or a folder.
    """
    path = Path(source)
    if name is not None and path.exists():
        raise UserError(f"the name {name!r} chooses a model of a service, and {str(path)!r} is on this machine; leave it out")
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    bundle = open_bundle(path)
    precision = precision or "fp32"
    if precision not in bundle.models:
        made = ", ".join(bundle.models)
        raise UserError(f"{str(path / MANIFEST)!r} lists no {precision} model; choose one that it has: {made}")
    return bundle.models[precision].path


def default_cache() -> Path:
    """The folder for downloaded models: `cibl_ray` below XDG_CACHE_HOME, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cibl_ray"
