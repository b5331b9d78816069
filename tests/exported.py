"""A small run on real digits and its bundle, made once for all tests that need one."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from cibl_ray.config import build_config
from cibl_ray.run.progress import Silent
from cibl_ray.training.fit import fit
from cibl_ray.world import World
from pipelines.common.config_file import find_config, read_config


def small_run(folder: Path, *options: str) -> Path:
    """Three epochs on long-tailed digits; the run's folder."""
    arguments = ["--epochs", "3", "--warmup_epochs", "1", "--loader.kind", "torch", "--precision", "fp32"]
    arguments += ["--prepared", str(folder / "prepared"), *options]
    config = build_config(read_config(find_config("quickstart")), arguments, "test")
    fit(config, folder / "digits", False, World(), Silent())
    return folder / "digits"


def mostly_linear() -> nn.Module:
    """A backbone as a transformer's layers are: patches by a convolution, then matrix products, images to (M, 48)."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(48, 48), nn.GELU())]
    return nn.Sequential(nn.Conv2d(3, 48, 4, stride=4), nn.Flatten(2), Tokens(), *layers, Mean())


class Tokens(nn.Module):
    """(M, D, T) to (M, T, D)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    """(M, T, D) to (M, D)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def bundle(run_folder: Path) -> Path:
    """fp32, fp16 and int8, with an embedding."""
    from cibl_ray.exporting.make_bundle import Options, make_bundle  # here: the GPU's tests run without onnxruntime

    out = run_folder / "bundle"
    options = Options(precisions=("fp32", "fp16", "int8"), embedding=True, calibration=100, max_drop=100, provider="cpu")
    make_bundle(run_folder / "checkpoints" / "best.safetensors", out, options)
    return out


@pytest.fixture(scope="session")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a bundle, as an earlier version made them."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(Path(__file__).parent / "cibl_ray" / "earlier" / "a12fa95.tar.xz") as archive:
        for member in archive:  # `extractall` has filters from Python 3.11.4 on, and warns without one
            if (content := archive.extractfile(member)) is not None:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
    return folder / "digits"
