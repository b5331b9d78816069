"""Where computed features lie: files by the digest of each image, in a folder for each set of weights and rule of pixels.

    PREPARED/features/KEY/000000.safetensors  000001.safetensors ...

An image that is added to a data set, or moves from training to validation, costs only its own features. Augmented views depend
on all images of a split and their order: they lie by place, and other images cost all of them. A file appears under its name
only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import nn

from pipelines.common.errors import UserError
from pipelines.common.files import locked, write_atomically
from pipelines.prepare.beton import Beton

log = logging.getLogger(__name__)

_DIGEST = 8  # bytes


def digests_of(beton: Beton) -> np.ndarray:
    """A digest of each image's stored bytes and shape, uint64 (N,)."""
    digests = np.empty(len(beton), dtype=np.uint64)
    kinds, widths, heights = beton.is_raw.astype(np.uint8), beton.widths, beton.heights
    for row in range(len(beton)):
        shape = f"{kinds[row]} {widths[row]} {heights[row]} ".encode()
        digest = hashlib.blake2b(shape, digest_size=_DIGEST)
        digest.update(beton.image(row).tobytes())
        digests[row] = int.from_bytes(digest.digest(), "little")
    return digests


def weights_digest(network: nn.Module) -> str:
    """A digest of a network's parameters and buffers."""
    state = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


class FeatureStore:
    """The features of one set of weights and one rule of pixels.

    Args:
        folder: Of all stores; one below it is this one's.
        what: Everything that the features follow from beside the image. It decides the store's folder.

    Raises:
        UserError: A folder cannot be made.
    """

    def __init__(self, folder: Path, what: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = folder / key
        self._damaged: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "what.json").exists():
                write_atomically(self.folder / "what.json", json.dumps(what, indent=1, default=str))
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def read(self, digests: np.ndarray) -> tuple[np.ndarray, torch.Tensor | None]:
        """The features that are there.

        Args:
            digests: Of the images, uint64 (N,).

        Returns:
            Which images have features, bool (N,), and the features of those, float32 (n, d), in order; None where none has.
        """
        parts = [part for path in sorted(self.folder.glob("[0-9]*.safetensors")) if (part := self._load(path)) is not None]
        if not parts:
            return np.zeros(len(digests), dtype=bool), None
        keys = np.concatenate([part[0] for part in parts])
        features = torch.cat([part[1] for part in parts])
        order = np.argsort(keys, kind="stable")
        place = np.minimum(np.searchsorted(keys[order], digests), len(keys) - 1)
        there = keys[order][place] == digests
        return there, features[torch.from_numpy(order[place[there]])]

    def add(self, digests: np.ndarray, features: torch.Tensor) -> None:
        """Keep the features of images, and remove the files that `read` found damaged.

        Args:
            digests: Of the images, (n,).
            features: (n, d).

        Raises:
            UserError: The disk is full.
        """
        content = to_bytes({"digests": torch.from_numpy(digests.view(np.int64).copy()), "features": features.contiguous()})
        try:
            with locked(self.folder / ".lock"):
                numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.safetensors") if path.stem.isdecimal()]
                write_atomically(self.folder / f"{max(numbers, default=-1) + 1:06d}.safetensors", content)
                while self._damaged:
                    self._damaged.pop().unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _load(self, path: Path) -> tuple[np.ndarray, torch.Tensor] | None:
        try:
            content = from_bytes(path.read_bytes())
            keys, features = content["digests"], content["features"]
        except (SafetensorError, KeyError, OSError) as error:
            log.warning("features %r are damaged (%s) and are computed again", str(path), str(error).partition("\n")[0])
            if not isinstance(error, OSError):  # the disk may give a file again that it does not give now
                self._damaged.append(path)
            return None
        return keys.numpy().view(np.uint64), features


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"features cannot be written to {str(folder)!r} ({error.strerror}); make room there, or name another folder: "
        "--data.prepared FOLDER"
    )
