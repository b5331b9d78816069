"""One run's configuration, composed of each part's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from pipelines.config import DataConfig, LoaderConfig
from pipelines.settings import Settings, absolute, find_config, override, parse_overrides, read_config, validate

log = logging.getLogger(__name__)


class LinearHeadConfig(Settings):
    """f = W·h + b."""

    kind: Literal["linear"] = "linear"


class CosineHeadConfig(Settings):
    """f_c = s · (ŵ_c · ĥ), both of unit norm."""

    kind: Literal["cosine"]
    scale: float = Field(default=16.0, gt=0)


HeadConfig = Annotated[LinearHeadConfig | CosineHeadConfig, Field(discriminator="kind")]


class ProjectionConfig(Settings):
    """The MLP before the contrastive loss: d_h -> hidden -> size, of unit norm."""

    hidden: int = Field(default=512, ge=1)
    size: int = Field(default=128, ge=1)


class NetworkConfig(Settings):
    backbone: Literal["resnet20", "resnet32", "resnet50", "resnext50"] = "resnet32"
    head: HeadConfig = LinearHeadConfig()
    projection: ProjectionConfig = ProjectionConfig()


class CrossEntropyConfig(Settings):
    """Plain cross-entropy on every view."""

    kind: Literal["cross_entropy"]


class CIBLConfig(Settings):
    """Class instance balanced loss."""

    kind: Literal["cibl"] = "cibl"
    tail_skew: float = Field(default=0.05, ge=0, description="λ: 0 is cross-entropy; more moves accuracy to rare classes")
    temperature: float = Field(default=0.1, gt=0)


LossConfig = Annotated[CrossEntropyConfig | CIBLConfig, Field(discriminator="kind")]


class OptimizerConfig(Settings):
    """SGD with Nesterov momentum."""

    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=5e-4, ge=0)
    clip_norm: float | None = Field(default=None, gt=0, description="largest norm of the gradient; None: no clipping")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0; set optimizer.nesterov: false")
        return self


class StepSchedule(Settings):
    """Linear warm-up, then the rate times `gamma` at each milestone (a share of the epochs)."""

    kind: Literal["steps"]
    warmup_epochs: float = Field(default=5, ge=0)
    milestones: tuple[float, ...] = (0.8, 0.9)
    gamma: float = Field(default=0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _shares(self) -> StepSchedule:
        if any(not 0 < milestone < 1 for milestone in self.milestones):
            raise ValueError("milestones are shares of the epochs, between 0 and 1")
        return self


class CosineSchedule(Settings):
    """Linear warm-up, then half a cosine down to `final` times the rate."""

    kind: Literal["cosine"] = "cosine"
    warmup_epochs: float = Field(default=5, ge=0)
    final: float = Field(default=0.0, ge=0, le=1)


ScheduleConfig = Annotated[StepSchedule | CosineSchedule, Field(discriminator="kind")]


class TrainConfig(Settings):
    epochs: int = Field(default=200, ge=1)
    batch_size: int = Field(default=128, ge=2, description="images a step; each gives data.views views")
    eval_batch_size: int = Field(default=500, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 mixed precision on GPUs and on CPUs with bf16 arithmetic, else fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: int = Field(default=1, ge=1, description="epochs between checkpoints")


class RunConfig(Settings):
    """Everything that decides a run. `seed` decides the order, the subset, the augmentation and the weights."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    runs: Path = Field(default=Path("runs"), description="folder for run folders")
    data: DataConfig = DataConfig()
    loader: LoaderConfig = LoaderConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = CIBLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = CosineSchedule()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.network.backbone in ("resnet50", "resnext50") and self.data.size < 33:
            raise ValueError(
                f"network.backbone {self.network.backbone!r} shrinks images 32-fold, data.size is {self.data.size}; "
                "use resnet20 or resnet32 for small images"
            )
        if self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.schedule.warmup_epochs:g} is more than train.epochs = {self.train.epochs}; "
                "lower it too: --warmup_epochs 1"
            )
        return self


def load_config(name: str, arguments: list[str]) -> RunConfig:
    """The configuration file or shipped configuration `name`, with command-line overrides. Raises UserError."""
    path = find_config(name)
    place = f"{path} with {' '.join(arguments)}" if arguments else str(path)
    return build_config(read_config(path), arguments, place)


def build_config(content: dict[str, Any], arguments: list[str], place: str) -> RunConfig:
    """A validated configuration with absolute paths. `place` is named in errors."""
    return absolute(validate(RunConfig, override(content, parse_overrides(arguments, RunConfig), RunConfig), place))


def save_config(config: RunConfig, path: Path) -> None:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
