"""Hybrid-SC and Hybrid-PSC: from learning features to learning the classifier in the course of a run.

Wang et al., "Contrastive Learning based Hybrid Networks for Long-Tailed Image Classification", 2021.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.base import Kappa, LossNeeds, LossSettings, SecondStream, Temperature, weighted_sum
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.losses.psc import psc
from cibl_ray.losses.supcon import supcon
from cibl_ray.networks.heads.base import HeadSettings
from pipelines.config import Sampling

if TYPE_CHECKING:
    import torch

Curve = Literal["parabolic", "linear", "cosine", "constant"]


class _Hybrid(LossSettings):
    temperature: Temperature = 0.1
    curve: Curve = Field(
        default="parabolic",
        description="Weight of the contrastive loss over the run: 1-(t/T)², 1-t/T, half a cosine, or `share` throughout.",
    )
    share: float = Field(default=0.5, ge=0, le=1, description="Weight of the contrastive loss where the curve is constant.")
    kappa: Kappa = 0.0
    classifier_sampling: Sampling = Field(
        default="class_balanced", description="Sampling of the batches that the classifier sees."
    )
    classifier_views: tuple[int, ...] = Field(
        default=(0,), min_length=1, description="Numbers of the data.views that the classifier sees."
    )

    @model_validator(mode="after")
    def _share_has_an_effect(self) -> _Hybrid:
        # The default passes: a run's own configuration names every field.
        if self.curve != "constant" and self.share != type(self).model_fields["share"].default:
            raise ValueError(
                f"share {self.share:g} would do nothing: the curve is {self.curve}; set curve: constant, or leave it out"
            )
        return self

    def check(self, head: HeadSettings, views: int) -> None:
        """Refuse views of the classifier that `data.views` does not have."""
        for view in self.classifier_views:
            if not 0 <= view < views:
                raise ValueError(f"loss.classifier_views names view {view}; data.views are 0 to {views - 1}")

    @property
    def _classifier_stream(self) -> SecondStream:
        return SecondStream(self.classifier_sampling, self.classifier_views)

    @abstractmethod
    def _contrastive(self, inputs: LossInputs) -> torch.Tensor:
        """The contrastive loss of the first stream, a scalar."""

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """α·contrastive on the first stream + (1-α)·cross-entropy on the second."""
        import torch

        assert inputs.second_stream is not None
        logits, labels = inputs.second_stream
        share = contrastive_share(self.curve, progress, self.share)
        classified = cross_entropy(adjust_logits(logits, prior.log_prior, self.kappa), labels).mean()
        terms = weighted_sum(share, self._contrastive(inputs), 1 - share, classified)
        return terms | {"contrastive_share": torch.tensor(share)}


class HybridSCConfig(_Hybrid):
    """From supervised contrastive learning to class-balanced classification in the course of the run."""

    kind: Literal["hybrid_sc"]

    @property
    def needs(self) -> LossNeeds:
        """Embeddings to compare with each other, and images of its own for the classifier."""
        return LossNeeds(projection=True, contrast=True, second_stream=self._classifier_stream)

    def _contrastive(self, inputs: LossInputs) -> torch.Tensor:
        z, contrast = inputs.contrasted()
        return supcon(z, inputs.labels, contrast, inputs.logits.shape[1], self.temperature).mean()


class HybridPSCConfig(_Hybrid):
    """The same with learned prototypes: memory grows with the classes, not with the square of the batch."""

    kind: Literal["hybrid_psc"]
    positive_in_denominator: bool = Field(
        default=False, description="Whether the denominator of the softmax has the own class's prototype."
    )

    @property
    def needs(self) -> LossNeeds:
        """Learned prototypes, and images of its own for the classifier."""
        return LossNeeds(projection=True, prototypes="learned", second_stream=self._classifier_stream)

    def _contrastive(self, inputs: LossInputs) -> torch.Tensor:
        z, prototypes = inputs.with_prototypes()
        return psc(z, inputs.labels, prototypes, self.temperature, self.positive_in_denominator).mean()


def contrastive_share(curve: Curve, progress: float, constant: float = 0.5) -> float:
    """α, the share of the contrastive loss: 1-(t/T)² (the paper's equation 4), 1-t/T, (1+cos(π·t/T))/2, or `constant`.

    Args:
        curve: Which of these.
        progress: t/T, the share of the run that is done.
        constant: α of the constant curve.
    """
    match curve:
        case "parabolic":
            return 1 - progress**2
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return constant
