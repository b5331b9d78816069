"""The head of a checkpoint: what it says of its run, read without its tensors and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from cibl_ray.run.folder import LAST, PREVIOUS

HEADER = "cibl_ray"
_LARGEST = 100_000_000  # bytes of a safetensors head


def read_head(path: Path) -> dict[str, Any] | None:
    """Read what a checkpoint says of its run.

    Args:
        path: A checkpoint.

    Returns:
        The content; None where the file is missing, cut short or not a checkpoint of this project.
    """
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            length, head = _head(file)
            end = max((tensor["data_offsets"][1] for name, tensor in head.items() if name != "__metadata__"), default=0)
            if path.stat().st_size != 8 + length + end:
                return None
        return _content(head)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def newest_head(checkpoints: Path) -> dict[str, Any] | None:
    """The head of the last whole checkpoint of a run's `checkpoints` folder; None where it has none."""
    for name in (LAST, PREVIOUS):
        if (head := read_head(checkpoints / name)) is not None:
            return head
    return None


def reached(file: IO[bytes]) -> tuple[int, int]:
    """(epoch, step) of a checkpoint, of which its head alone is read; (0, 0) where it is not one of ours."""
    try:
        content = _content(_head(file)[1])
        return content["epoch"], content.get("step", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0, 0


def reached_in(checkpoints: Path) -> tuple[int, int]:
    """(epoch, step) of the last whole checkpoint of a run's `checkpoints` folder; (0, 0) where it has none."""
    heads = [head for name in (LAST, PREVIOUS) if (head := read_head(checkpoints / name)) is not None]
    return max(((head["epoch"], head.get("step", 0)) for head in heads), default=(0, 0))


def _head(file: IO[bytes]) -> tuple[int, dict[str, Any]]:
    """The length and the content of a safetensors file's head."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= _LARGEST:
        raise ValueError("not a safetensors file")
    return length, json.loads(file.read(length))


def _content(head: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(head["__metadata__"][HEADER])
    if not isinstance(content["epoch"], int):
        raise TypeError("epoch")
    return content
