"""Parametric contrastive learning (Cui et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cibl_ray.losses import pairs
from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.base import ContrastMemory, Kappa, Temperature
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs, Terms
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch


class PaCoConfig(ContrastMemory):
    """Parametric contrastive learning: class centres (the classifier) and embeddings in one softmax."""

    kind: Literal["paco"]
    temperature: Temperature = 0.07
    kappa: Kappa = 1.0
    alpha: float = Field(default=0.05, gt=0, description="Weight of each positive embedding.")
    beta: float = Field(default=1.0, gt=0, description="Weight of the class centre.")
    queue: int = Field(default=1024, ge=0, le=2**20, description="Embeddings of earlier batches to contrast with.")
    momentum: float | None = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="Decay of the averaged network that embeds every view but the first; null: the network embeds all.",
    )

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """The terms of `paco`."""
        z, contrast = inputs.contrasted()
        logits = adjust_logits(inputs.logits, prior.log_prior, self.kappa)
        return paco(logits, z, inputs.labels, contrast, self.temperature, self.alpha, self.beta, inputs.all_labels)


def paco(
    logits: torch.Tensor,
    z: torch.Tensor,
    labels: torch.Tensor,
    contrast: ContrastSet,
    temperature: float,
    alpha: float,
    beta: float,
    all_labels: torch.Tensor | None = None,
) -> Terms:
    """Parametric contrastive loss (Cui et al. 2021, equation 4).

    The class centres and the embeddings share one softmax: with D = Σ_c exp(f_c) + Σ_{a≠m} exp(z_m·z_a/τ),

        l(m) = -[ β·log(exp(f_y)/D) + α·Σ_{p∈P(m)} log(exp(z_m·z_p/τ)/D) ] / (β + α·|P(m)|).

    Args:
        logits: f, where wanted with κ·log π added, (M, C).
        z: The anchors' embeddings of unit norm, (M, d).
        labels: int64 (M,).
        contrast: What the anchors are compared with.
        temperature: τ.
        alpha: α, the weight of a positive embedding.
        beta: β, the weight of the class centre.
        all_labels: The labels of all workers' anchors, where they are not `labels`.

    Returns:
        "loss", the mean of l; detached "center", the mean of -log(exp(f_y)/D), and "contrastive", that of the positives' mean,
        over the anchors that have any. Their number is this worker's part of all workers', so that the workers' terms add up to
        the whole batch's.
    """
    import torch

    logits = at_least_float32(logits)
    classes = logits.shape[1]
    log_sum, positive_sum = pairs.pair_sums(z, labels, contrast, classes, temperature)
    log_sum = torch.logaddexp(logits.logsumexp(1), log_sum)
    center = logits.gather(1, labels[:, None]).squeeze(1)
    count = pairs.positive_counts(labels, contrast.labels, classes).to(center.dtype)
    losses = log_sum - (beta * center + alpha * positive_sum) / (beta + alpha * count)
    with torch.no_grad():
        has = (count > 0).to(count.dtype)
        number = has.sum()
        if all_labels is not None and all_labels is not labels:
            all_have = (pairs.positive_counts(all_labels, contrast.labels, classes) > 0).to(count.dtype)
            number = all_have.mean() * len(labels)
        contrasted = (has * (log_sum - positive_sum / count.clamp(min=1))).sum() / number.masked_fill(number == 0, 1)
        parts = {"center": (log_sum - center).mean(), "contrastive": contrasted}
    return {"loss": losses.mean()} | parts
