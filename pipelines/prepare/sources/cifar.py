"""CIFAR-10 and CIFAR-100 through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.prepare.sources.dataset import Dataset, Images, SourceConfig


class Cifar10Source(SourceConfig):
    """CIFAR-10 through torchvision."""

    kind: Literal["cifar10"]
    path: Path = Field(default=Path("data"), description="folder that holds it, or that it is downloaded to")
    download: bool = Field(default=True, description="download it where it is missing")

    def open(self) -> Dataset:
        """Training and test images; downloaded where they are missing and `download` allows it."""
        return _open("CIFAR10", self.path, self.download)

    def present(self) -> bool:
        """Whether the folder has it."""
        return (self.path / "cifar-10-batches-py").is_dir()


class Cifar100Source(SourceConfig):
    """CIFAR-100 through torchvision."""

    kind: Literal["cifar100"]
    path: Path = Field(default=Path("data"), description="folder that holds it, or that it is downloaded to")
    download: bool = Field(default=True, description="download it where it is missing")

    def open(self) -> Dataset:
        """Training and test images; downloaded where they are missing and `download` allows it."""
        return _open("CIFAR100", self.path, self.download)

    def present(self) -> bool:
        """Whether the folder has it."""
        return (self.path / "cifar-100-python").is_dir()


def _open(name: str, path: Path, download: bool) -> Dataset:
    from torchvision import datasets

    parts: dict[bool, Any] = {}
    for train in (True, False):
        try:
            parts[train] = getattr(datasets, name)(str(path), train=train, download=download)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{name} is not in {str(path)!r} and could not be downloaded ({error}); "
                "download it there, or use an image folder: --data.source.kind folder --data.source.path FOLDER"
            ) from error
    return Dataset(list(parts[True].classes), _images(parts[True]), test=_images(parts[False]))


def _images(part: Any) -> Images:
    return Images([str(i) for i in range(len(part.data))], np.array(part.targets, np.int64), pixels=np.asarray(part.data))
