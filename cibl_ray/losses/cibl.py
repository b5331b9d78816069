"""Class instance balanced loss: contrastive for classes common in the batch, cross-entropy for rare ones.

Lavoie & Waslander, "Class Instance Balanced Learning for Long-Tailed Classification", 2023. The paper's abstract states that
the two terms are weighted by how often a sample's class occurs in the batch; the exact weight below is our reading of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from cibl_ray.losses import pairs
from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.base import ContrastMemory, Kappa, Temperature
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs, Terms
from cibl_ray.losses.supcon import supcon_and_positives
from cibl_ray.losses.vs import logit_scales, scaled_logits

if TYPE_CHECKING:
    import torch

Normalization = Literal["none", "batch", "class"]
Count = Literal["batch", "expected"]


def _from_bool(value: object) -> object:
    """Earlier versions knew true and false."""
    return {True: "batch", False: "none"}[value] if isinstance(value, bool) else value


class CIBLConfig(ContrastMemory):
    """Class instance balanced loss."""

    kind: Literal["cibl"] = "cibl"
    tail_skew: float = Field(default=0.05, ge=0, le=1e9, description="λ: 0 is cross-entropy; more moves accuracy to the tail.")
    temperature: Temperature = 0.1
    kappa: Kappa = 0.0
    logit_gamma: float = Field(
        default=0.0, ge=0, le=10, description="γ: cross-entropy's logit c is scaled by (n_c / n_max)^γ, as in VS. 0: as it is."
    )
    count: Count = Field(
        default="batch",
        description="Instances of its class that a sample counts for its weight. batch: those among the contrasted embeddings; "
        "expected: as many as the class's share of the training images lets expect there.",
    )
    classify: Literal["all", "first"] = Field(
        default="all", description="Views that cross-entropy sees; with momentum always the first."
    )
    normalize: Annotated[Normalization, BeforeValidator(_from_bool)] = Field(
        default="none",
        description="batch (or true): scale the cross-entropy weights 1-w to a mean of 1 over the batch; class: both terms are "
        "means within each class first, then over the classes of the batch",
    )

    @property
    def advice_for_rare_classes(self) -> str:
        """More weight on them, or the prior."""
        return "a larger --loss.tail_skew" + ("" if self.adds_prior else ", or --loss.kappa 1")

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """The terms of `cibl`."""
        z, contrast = inputs.contrasted()
        logits = inputs.logits
        if self.logit_gamma:
            logits = scaled_logits(logits, logit_scales(prior.train_counts, self.logit_gamma))
        return cibl(
            adjust_logits(logits, prior.log_prior, self.kappa),
            z,
            inputs.labels,
            contrast,
            self.tail_skew,
            self.temperature,
            inputs.views if self.classify == "first" else 1,
            self.normalize,
            inputs.all_labels,
            prior.log_prior.exp() if self.count == "expected" else None,
        )


def term_weights(positives: torch.Tensor, tail_skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the contrastive term and of cross-entropy.

    Args:
        positives: |P(m)| as floats, (M,).
        tail_skew: λ.

    Returns:
        (w, 1 - w) with w_m = λ·|P(m)| / (1 + λ·|P(m)|), (M,) each. w is 0 for λ = 0 or a class that comes once, and towards 1
        for common classes. 1 - w is computed by itself, which keeps its digits for large λ.
    """
    weighted = tail_skew * positives
    rest = (1 + weighted).reciprocal()
    return weighted * rest, rest


def class_shares(labels: torch.Tensor, all_labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Weights that turn a mean over all anchors into one over the present classes of each class's mean.

    Args:
        labels: Of this worker's anchors, int64 (M,).
        all_labels: Of all workers' anchors, int64 (N,).
        classes: C.

    Returns:
        N / (K·n_y), float64 (M,), of mean 1 over all workers; K classes are present, n_y anchors are of class y.
    """
    sizes = pairs.class_counts(all_labels, classes)
    return len(all_labels) / ((sizes > 0).sum() * sizes.index_select(0, labels)).double()


def cibl(
    logits: torch.Tensor,
    z: torch.Tensor,
    labels: torch.Tensor,
    contrast: ContrastSet,
    tail_skew: float,
    temperature: float,
    classify_every: int = 1,
    normalization: Normalization = "none",
    all_labels: torch.Tensor | None = None,
    frequencies: torch.Tensor | None = None,
) -> Terms:
    """Class instance balanced loss: mean_m [ (1 - w_m)·CE_m ] + mean_m [ w_m·SupCon_m ].

    λ = 0 is `cross_entropy` to the bit.

    Args:
        logits: Where wanted with κ·log π added, (M, C).
        z: The anchors' embeddings of unit norm, (M, d).
        labels: int64 (M,).
        contrast: What the anchors are compared with. P(m), whose size decides w_m, counts all of it.
        tail_skew: λ.
        temperature: τ.
        classify_every: V takes the first mean over the rows 0, V, 2V, ... alone: the first of V views.
        normalization: Readings of what the abstract leaves open. "batch" divides the first mean by the mean of 1 - w_m, so that
            λ decides which classes cross-entropy teaches and not how much of it there is: λ → ∞ is then cross-entropy with
            weights ∝ 1/|P| beside SupCon. "class" takes both means within each class first, then over the classes of the batch,
            so that λ = 0 is cross-entropy in which each class of the batch weighs alike.
        all_labels: The labels of all workers' anchors, where they are not `labels`.
        frequencies: π, (C,). |P(m)| in w_m is then its expectation, (A - 1)·π_y for a contrast set of A; None: what is there.

    Returns:
        Scalars: the "loss", both terms unweighted, and the mean weight of cross-entropy.
    """
    contrastive, positives = supcon_and_positives(z, labels, contrast, logits.shape[1], temperature)
    all_labels = labels if all_labels is None else all_labels
    expected = None if frequencies is None else (frequencies * (len(contrast.labels) - 1)).to(positives.dtype)
    weight, rest = term_weights(positives if expected is None else expected.index_select(0, labels), tail_skew)
    if normalization == "class":
        shares = class_shares(labels, all_labels, logits.shape[1]).to(weight.dtype)
        weight, rest = weight * shares, rest * shares
    chosen, chosen_labels = logits, labels
    if classify_every > 1:  # the gradient of a slice is a copy of all logits, even where the slice is all of them
        rest, chosen, chosen_labels = (each[::classify_every] for each in (rest, logits, labels))
    classified = cross_entropy(chosen, chosen_labels)
    classification = (rest * classified).mean()
    if normalization == "batch":
        if expected is None:
            counts = pairs.positive_counts(all_labels, contrast.labels, logits.shape[1]).to(rest.dtype)
        else:
            counts = expected.index_select(0, all_labels)
        classification = classification / term_weights(counts, tail_skew)[1][::classify_every].mean()
    loss = classification + (weight * contrastive).mean()
    return {
        "loss": loss,
        "cross_entropy": classified.detach().mean(),
        "contrastive": contrastive.detach().mean(),
        "cross_entropy_weight": rest.mean(),
    }
