"""Cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cibl_ray.losses.base import LossSettings
from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch


class CrossEntropyConfig(LossSettings):
    """Plain cross-entropy on every view."""

    kind: Literal["cross_entropy"]

    @property
    def advice_for_rare_classes(self) -> str:
        """A loss that knows how rare a class is."""
        return "--loss.kind balanced_softmax"

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """The mean of `cross_entropy`."""
        return {"loss": cross_entropy(inputs.logits, inputs.labels).mean()}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax(f)_y of logits (M, C) and labels int64 (M,): (M,), in at least float32."""
    import torch.nn.functional as F

    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")
