"""The linear classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cibl_ray.networks.heads.base import ClassScale, HeadSettings

if TYPE_CHECKING:
    import torch


class LinearHeadConfig(HeadSettings):
    """f = W·h + b."""

    kind: Literal["linear"] = "linear"
    class_scale: ClassScale = None
    max_norm: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="MaxNorm: cap the norm of each class's weights after each step. The cap lies this share of the way from "
        "the smallest norm at the start to the largest; null: no cap.",
    )
    bias: ClassVar[bool] = True

    def logits(
        self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | float
    ) -> torch.Tensor:
        """Compute f = W·h + b, (M, C)."""
        import torch.nn.functional as F

        return F.linear(h, weight, bias)

    @property
    def class_scale_rate(self) -> float | None:
        """As configured."""
        return self.class_scale

    @property
    def norm_share(self) -> float | None:
        """As configured."""
        return self.max_norm
