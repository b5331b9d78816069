"""CIFAR-10-LT for benchmarks: real images where the user names them, else torchvision's copy."""

from __future__ import annotations

import argparse
from pathlib import Path

from cibl_ray.config import RunConfig, load_config
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.prepared import Prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="CIFAR-10 as an image folder; by default torchvision's copy in data/")
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer rounds")


def cifar10_lt(images: Path | None, *flags: str) -> tuple[RunConfig, Prepared]:
    """The configuration `cifar10_lt` with overrides, and its prepared data."""
    source = ["--data.source.kind", "folder", "--data.source.path", str(images)] if images else []
    config = load_config("cifar10_lt", [*source, *flags])
    return config, ensure_prepared(config.data, config.seed)
