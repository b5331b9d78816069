"""Probabilistic contrastive learning.

Du et al., "Probabilistic Contrastive Learning for Long-Tailed Visual Recognition", 2024.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.base import Kappa, LossNeeds, LossSettings, Temperature, weighted_sum
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.networks.heads.base import HeadSettings
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch

_MOST_CONCENTRATED = 1e5  # κ of a class whose embeddings coincide, as in the authors' code


class ProCoConfig(LossSettings):
    """Contrast with the distribution of each class, estimated over the epoch, beside logit-adjusted cross-entropy.

    Cross-entropy sees the first view, the contrast all others.
    """

    kind: Literal["proco"]
    temperature: Temperature = 0.1
    kappa: Kappa = 1.0
    contrastive_weight: float = Field(default=1.0, ge=0, description="Weight of the contrastive term.")

    @property
    def needs(self) -> LossNeeds:
        """The embeddings of all workers, and each class's mean of them."""
        return LossNeeds(projection=True, contrast=True, class_means=True)

    def check(self, head: HeadSettings, views: int) -> None:
        """Refuse one view: there would be none to contrast."""
        if views < 2:
            raise ValueError("loss.kind 'proco' contrasts every view but the first, and data.views has one; add a view")

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """Cross-entropy on the first view, and on the contrast logits of the others."""
        assert inputs.class_means is not None
        z, labels, contrast = inputs.contrasted_others()
        means = inputs.class_means(contrast.embeddings, contrast.labels, progress)
        contrastive = probabilistic_contrastive(z, labels, means, prior.log_prior, self.temperature, self.kappa).mean()
        logits = adjust_logits(inputs.logits[:: inputs.views], prior.log_prior, self.kappa)
        classified = cross_entropy(logits, inputs.labels[:: inputs.views]).mean()
        return weighted_sum(self.contrastive_weight, contrastive, 1.0, classified)


def probabilistic_contrastive(
    z: torch.Tensor, labels: torch.Tensor, means: torch.Tensor, log_prior: torch.Tensor, temperature: float, kappa: float = 1.0
) -> torch.Tensor:
    """ProCo's loss, L_in: cross-entropy on `contrast_logits` + κ·log π (Du et al. 2024, equation 13).

    Args:
        z: Embeddings of unit norm, (M, d).
        labels: int64 (M,).
        means: The mean embedding of each class, (C, d), of a norm below 1.
        log_prior: log π, (C,).
        temperature: τ.
        kappa: Factor of log π; 1 in the paper.

    Returns:
        One value a sample, (M,).
    """
    return cross_entropy(adjust_logits(contrast_logits(z, means, temperature), log_prior, kappa), labels)


def contrast_logits(z: torch.Tensor, means: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logarithm of E[exp(z·x/τ)], x drawn from each class's von Mises-Fisher distribution.

    With R the norm of a class's mean, its concentration is κ = d·R/(1-R²), and the expectation is C(κ)/C(|κ·μ + z/τ|), C the
    normalising constant of the distribution on the sphere in d dimensions.

    Args:
        z: Embeddings of unit norm, (M, d), d at least 16.
        means: The mean embedding of each class, (C, d), without a gradient.
        temperature: τ.

    Returns:
        (M, C), in at least float32.
    """
    import torch
    import torch.nn.functional as F

    z = at_least_float32(z)
    means = means.to(z.dtype)
    length = means.double().norm(dim=1)
    width = z.shape[1]
    concentration = (width * length / (1 - length**2).clamp(min=1e-12)).clamp(max=_MOST_CONCENTRATED)
    with torch.autocast(z.device.type, enabled=False):
        cosines = (z @ F.normalize(means, dim=1).T).double()
    # Concentrations reach 1e5, and their difference decides: in float64, of (M, C) numbers.
    squared = concentration**2 + (2 / temperature) * concentration * cosines + ((z * z).sum(1, keepdim=True) / temperature**2)
    return (_log_constant(squared, width) - _log_constant(concentration**2, width)).to(z.dtype)


def _log_constant(squared: torch.Tensor, width: int) -> torch.Tensor:
    """-log C(κ) up to a constant, log I_ν(κ) - ν·log κ, of κ², float64; ν = d/2 - 1.

    Debye's expansion of the Bessel function for large ν² + κ² (DLMF 10.41.3): with four terms it is exact to 2e-7 for d = 16,
    2e-11 for d = 128.
    """
    import torch

    order = width / 2 - 1
    root = (order**2 + squared).clamp(min=1e-12).sqrt()
    p = (order / root) ** 2
    terms = (3 - 5 * p) / (24 * root)
    terms = terms + (81 - 462 * p + 385 * p**2) / (1152 * root**2)
    terms = terms + (30375 - 369603 * p + 765765 * p**2 - 425425 * p**3) / (414720 * root**3)
    fourth = 4465125 - 94121676 * p + 349922430 * p**2 - 446185740 * p**3 + 185910725 * p**4
    terms = terms + fourth / (39813120 * root**4)
    return root - order * (order + root).log() - 0.5 * (2 * math.pi * root).log() + torch.log1p(terms)
