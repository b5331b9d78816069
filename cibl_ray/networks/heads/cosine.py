"""The cosine classifier, and the schedule of its scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from cibl_ray.networks.heads.base import ClassScale, HeadSettings
from pipelines.common.settings import Settings

if TYPE_CHECKING:
    import torch


class ScaleConfig(Settings):
    """A cosine head's s over the run: `start` for the warm-up epochs, then by the shape to `end`."""

    start: float = Field(default=16.0, gt=0, description="Scale at the start.")
    end: float | None = Field(default=None, gt=0, description="Scale at the end of the run; null: as at the start.")
    shape: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How the scale moves from start to end."
    )
    warmup: float = Field(default=0, ge=0, description="Epochs at `start` before the scale moves.")
    learnable: bool = Field(default=False, description="Learn the scale with the weights, beginning at `start`.")

    @model_validator(mode="after")
    def _consistent(self) -> ScaleConfig:
        if (self.end is None) != (self.shape == "constant"):
            raise ValueError("a shape of linear or cosine needs an `end`, a constant scale has none")
        if self.learnable and self.end is not None:
            raise ValueError("a learned scale follows no shape: leave out `end`, or set learnable: false")
        if self.warmup and self.end is None:
            raise ValueError(
                f"warmup {self.warmup:g} would do nothing: it delays a shape of linear or cosine, which needs an `end`; "
                "leave it out, or set both"
            )
        return self


class CosineHeadConfig(HeadSettings):
    """f_c = s · (ŵ_c · ĥ), both of unit norm. Norms, larger for common classes, play no part."""

    kind: Literal["cosine"]
    scale: ScaleConfig = ScaleConfig()
    weight_norm: float | None = Field(
        default=None,
        gt=0,
        description="Norm of each class's weights at the start, 1 in LDAM's and BCL's code; null: as torch.nn.Linear draws "
        "them (.58). The smaller it is, the faster the direction turns.",
    )
    class_scale: ClassScale = None
    cosine: ClassVar[bool] = True

    def logits(
        self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | float
    ) -> torch.Tensor:
        """Compute s · (ŵ_c · ĥ), (M, C).

        In float32 under autocast too: s would multiply bf16's rounding of a cosine to an error of .1 in a logit.
        """
        import torch
        import torch.nn.functional as F

        if torch.is_autocast_enabled(h.device.type):
            with torch.autocast(h.device.type, enabled=False):
                return self.logits(h.float(), weight, bias, scale)
        return scale * F.linear(F.normalize(h, dim=1), F.normalize(weight, dim=1))

    @property
    def initial_scale(self) -> float:
        """The scale s at the start of a run."""
        return self.scale.start

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is learned with the weights."""
        return self.scale.learnable

    @property
    def initial_norm(self) -> float | None:
        """The configured norm of the weights at the start."""
        return self.weight_norm

    @property
    def class_scale_rate(self) -> float | None:
        """As configured."""
        return self.class_scale

    def scale_at(self, epoch: float, epochs: int) -> float | None:
        """The scheduled scale at `epoch` of `epochs`; None where it is learned."""
        return None if self.scale.learnable else scheduled_scale(self.scale, epoch, epochs)

    def check(self, epochs: int) -> None:
        """Refuse a warm-up of the scale that is as long as the run."""
        if self.scale.warmup >= epochs:
            raise ValueError(
                f"network.head.scale.warmup = {self.scale.warmup:g} leaves no epoch of train.epochs = {epochs} for "
                "the scale to move in; lower it: --head.scale.warmup 0"
            )


def scheduled_scale(scale: ScaleConfig, epoch: float, epochs: int) -> float:
    """A cosine head's s: `start` for the warm-up epochs, then by the shape to `end`, reached as the run ends.

    Args:
        scale: The schedule.
        epoch: Where the run stands, in epochs; 3.5 is the middle of the fourth.
        epochs: Length of the run.

    Returns:
        The scale, which multiplies cosines.
    """
    if scale.end is None or epoch < scale.warmup:
        return scale.start
    done = min((epoch - scale.warmup) / max(epochs - scale.warmup, 1e-9), 1.0)
    share = done if scale.shape == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return scale.start + (scale.end - scale.start) * share
