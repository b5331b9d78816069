"""The linear classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from cibl_ray.networks.heads.base import HeadSettings

if TYPE_CHECKING:
    import torch


class LinearHeadConfig(HeadSettings):
    """f = W·h + b."""

    kind: Literal["linear"] = "linear"
    bias: ClassVar[bool] = True

    def logits(
        self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | float
    ) -> torch.Tensor:
        """Compute f = W·h + b, (M, C)."""
        import torch.nn.functional as F

        return F.linear(h, weight, bias)
