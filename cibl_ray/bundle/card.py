"""What an exported model says of itself: the metadata of its ONNX files, and the manifest of its bundle folder.

    BUNDLE/manifest.json  model.onnx  model.fp16.onnx  model.int8.onnx  README.md  class_counts.png  tail_shift.png

Standard library and `EvalRule` alone, so that an edge device can read it too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from pipelines.pixels import EvalRule

FORMAT = 1
MANIFEST = "manifest.json"
METADATA = "cibl_ray"  # the key of the ONNX file's metadata_props
IMAGES = "images"
MAX_SHIFT = 100.0  # of tail_shift, either way
TAIL_SHIFT = "tail_shift"  # an input of services, and of the ONNX files of earlier versions
LOGITS, PROBABILITIES, LOG_PRIOR, EMBEDDING = "logits", "probabilities", "log_prior", "embedding"
FILES = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's names of what a service takes, if its settings name no others
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of a model: safe in a path, a URL and a log


@dataclass(frozen=True)
class Card:
    """What an ONNX file's metadata says. All precisions of a bundle have the same, except for `precision`.

    Attributes:
        name: The model's name for its clients.
        precision: 'fp32', 'fp16' or 'int8'.
        classes: C class names, in the order of the logits.
        train_counts: Training images of each class, C numbers.
        groups: The shot group of each class: 'many', 'medium' or 'few'.
        rule: How an image becomes the input.
        accuracy: Precision to score to share, 0 to 1, measured with onnxruntime.
        source: The run, its checkpoint and epoch.
        versions: Of the packages that made the file.
        tail_shift: The default shift of the answers. A client's `tail_shift` is added to it.
    """

    name: str
    precision: str
    classes: list[str]
    train_counts: list[int]
    groups: list[str]
    rule: EvalRule
    accuracy: dict[str, dict[str, Any]]
    source: dict[str, Any]
    versions: dict[str, str]
    tail_shift: float = 0.0

    def dump(self) -> dict[str, Any]:
        """The card as JSON, for the metadata and the manifest; `read_card` reads it."""
        content = {"format": FORMAT, **asdict(self), "input": describe(self.rule)}
        if self.rule.window is None:
            del content["rule"]["window"]  # earlier versions do not know it
        if self.rule.interpolation == "bilinear":
            del content["rule"]["interpolation"]
        # In a manifest, `tail_shift` is the table of shifts.
        content["default_tail_shift"] = content.pop("tail_shift")
        return content


def describe(rule: EvalRule) -> str:
    """The rule in words, for those who write their own client."""
    steps = ["decode; rotate by EXIF; flatten onto white; RGB"]
    if rule.window is not None:
        steps.append(f"grey of more than 8 bits: {rule.window[0]:g} becomes black, {rule.window[1]:g} white")
    if rule.square is not None:
        steps.append(f"resize to {rule.square}x{rule.square} (bicubic, antialiased)")
    elif rule.max_side is not None:
        steps.append(
            f"if a side is longer than {rule.max_side}, scale down so that it is {rule.max_side} (bicubic, antialiased)"
        )
    steps.append(
        f"resize so that the shorter side is {rule.side} ({rule.interpolation}, antialiased), the longer one rounded down"
    )
    steps.append(f"central {rule.size}x{rule.size}; uint8 NHWC, 0 to 255")
    return "; ".join(steps)


def read_card(content: Any, place: str) -> Card:
    """Read a card.

    Args:
        content: The JSON of a file's metadata or of a manifest, as text or parsed.
        place: Where it was found, for messages.

    Raises:
        UserError: It is of another format, or not a model of this project.
    """
    try:
        if isinstance(content, str):
            content = json.loads(content)
        if content["format"] != FORMAT:
            raise UserError(f"{place} has format {content['format']}, this version reads {FORMAT}")
        card = Card(
            **{key: content[key] for key in Card.__dataclass_fields__ if key not in ("rule", "tail_shift")},
            tail_shift=content.get("default_tail_shift", 0.0),  # a bundle of an earlier version has none
            rule=EvalRule(**content["rule"]),
        )
        if not isinstance(card.name, str):
            raise TypeError("name")
        if not (len(card.classes) == len(card.train_counts) == len(card.groups) > 0):
            raise UserError(f"{place}: classes, training counts and groups differ in number")
        return card
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place} does not describe a model of cibl-ray ({error!r})") from error


@dataclass(frozen=True)
class ModelFile:
    """One precision's file.

    Attributes:
        path: The file, inside the bundle.
        sha256: Its digest, hexadecimal.
        bytes: Its size.
    """

    path: Path
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Bundle:
    """A bundle folder whose files are those that its manifest lists.

    Attributes:
        folder: The bundle.
        card: What the models are.
        models: The file of each precision.
        manifest: The content of manifest.json.
    """

    folder: Path
    card: Card
    models: Mapping[str, ModelFile]
    manifest: dict[str, Any]


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every file's SHA-256.

    Args:
        folder: The bundle.

    Raises:
        UserError: The folder is no bundle, or a file is missing or has changed.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{str(folder)!r} is not a bundle: it has no {MANIFEST}; make one: python -m cibl_ray.export RUN"
        ) from error
    except NotADirectoryError as error:
        raise UserError(
            f"{str(folder)!r} is a file, not the folder of a bundle; make one: python -m cibl_ray.export RUN"
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(path)!r} cannot be read: {reason}; export the run again") from error
    card = read_card(manifest, str(path))
    if not NAME.fullmatch(card.name):
        raise UserError(f"{str(path)!r}: the name {card.name!r} is not a model's; letters, digits, '.', '_', '-'")
    try:
        for name, sha256 in manifest["files"].items():
            if Path(name).name != name or file_sha256(folder / name) != sha256:
                raise UserError(f"{str(folder / name)!r} is not the file that {MANIFEST} lists; export the run again")
        models = {
            precision: ModelFile(
                folder / FILES[precision], manifest["files"][FILES[precision]], (folder / FILES[precision]).stat().st_size
            )
            for precision in manifest["precisions"]
        }
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error!r}); export the run again") from error
    except OSError as error:
        raise UserError(f"{str(folder)!r} is not whole: {error.filename}: {error.strerror}; export the run again") from error
    if not models:
        raise UserError(f"{str(path)!r} lists no model")
    return Bundle(folder, card, models, manifest)


def file_sha256(path: Path) -> str:
    """The SHA-256 digest of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
