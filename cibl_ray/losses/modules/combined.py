"""Modules of the losses that train a classifier and embeddings together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.bcl import BCLConfig
from cibl_ray.losses.checks import check_whole, checked_settings, to_unit_norm
from cibl_ray.losses.cibl import CIBLConfig, Count, Normalization
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.hybrid import Curve, HybridPSCConfig, HybridSCConfig
from cibl_ray.losses.inputs import ContrastSet, LossInputs
from cibl_ray.losses.memory import ClassMeans
from cibl_ray.losses.modules.base import Batch, ClassCounts, Labelled, LossModule, learned_prototypes
from cibl_ray.losses.paco import PaCoConfig
from cibl_ray.losses.proco import ProCoConfig, probabilistic_contrastive


class _OfBoth(LossModule):
    views = 1

    def forward(
        self, logits: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor, queue: Labelled | None = None
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: (M, C).
            embeddings: (M, d).
            labels: (M,).
            queue: More labelled embeddings to contrast with, (K, d) and (K,), without a gradient. PaCo's is a MoCo queue.

        Returns:
            A scalar.
        """
        return self._mean(Batch(labels, logits, embeddings, queue, views=self.views))


class _Hybrid(LossModule):
    prototypes: nn.Parameter | None

    def forward(
        self,
        logits: torch.Tensor,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        classifier_labels: torch.Tensor | None = None,
        progress: float = 0.0,
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: Of the images that the classifier learns from, (N, C).
            embeddings: (M, d).
            labels: Of the embeddings, (M,).
            classifier_labels: Of the logits, (N,); None: `labels`, where both are of the same images.
            progress: Share of the run that is done, t/T, 0 to 1.

        Returns:
            A scalar.
        """
        second_stream = logits, labels if classifier_labels is None else classifier_labels
        prototypes = None if self.prototypes is None else to_unit_norm(self.prototypes)
        return self._mean(
            Batch(labels, embeddings=embeddings, prototypes=prototypes, second_stream=second_stream, progress=progress)
        )


class CIBLLoss(_OfBoth):
    """Class instance balanced loss: mean of (1-w)·CE + w·SupCon, w = λ·|P|/(1 + λ·|P|) (Lavoie & Waslander 2023).

    |P| counts the other rows of the same class in the contrast set. The weight is our reading of the paper's abstract.

    Args:
        class_counts: Training images of each class, (C,). They matter where kappa or logit_gamma is not 0, or count is
            "expected"; their number always does.
        tail_skew: λ. 0 is cross-entropy; more moves accuracy to the rare classes.
        temperature: τ.
        kappa: κ: adds κ·log π to the logits.
        normalize: What the weights are divided by: "none"; "batch", so that 1-w has mean 1 over the batch; or "class", the mean
            over the classes of each class's mean.
        views: V > 1: cross-entropy sees the rows 0, V, 2V, ... alone, the first view of each image.
        logit_gamma: γ: scales logit c by (n_c / n_max)^γ.
        count: |P| in the weights: "batch", as many as there are; "expected", as many as the class counts let expect.
        normalized: The embeddings have unit norm already.
        gather: Contrast with the embeddings of all processes.
        validate: Check the values of the inputs.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        tail_skew: float = 0.05,
        temperature: float = 0.1,
        kappa: float = 0.0,
        normalize: Normalization = "none",
        views: int = 1,
        *,
        logit_gamma: float = 0.0,
        count: Count = "batch",
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        check_whole("views", views, 1)
        classify: Literal["all", "first"] = "first" if views > 1 else "all"
        config = checked_settings(
            CIBLConfig,
            tail_skew=tail_skew,
            temperature=temperature,
            kappa=kappa,
            normalize=normalize,
            classify=classify,
            logit_gamma=logit_gamma,
            count=count,
        )
        super().__init__(config, class_counts, normalized, gather, validate)
        self.views = views


class BCLLoss(LossModule):
    """Balanced contrastive learning beside logit-adjusted cross-entropy (Zhu et al. 2022, equation 7).

    Args:
        class_counts: Training images of each class, (C,).
        temperature: τ.
        kappa: κ: adds κ·log π to the logits.
        cross_entropy_weight: Of cross-entropy.
        contrastive_weight: Of the contrastive loss.
        normalized: Embeddings and prototypes have unit norm already.
        gather: Contrast with the embeddings of all processes.
        validate: Check the values of the inputs.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        temperature: float = 0.1,
        kappa: float = 1.0,
        cross_entropy_weight: float = 2.0,
        contrastive_weight: float = 0.6,
        *,
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        config = checked_settings(
            BCLConfig,
            kind="bcl",
            temperature=temperature,
            kappa=kappa,
            cross_entropy_weight=cross_entropy_weight,
            contrastive_weight=contrastive_weight,
        )
        super().__init__(config, class_counts, normalized, gather, validate)

    def forward(
        self,
        logits: torch.Tensor,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        prototypes: torch.Tensor,
        queue: Labelled | None = None,
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: (M, C).
            embeddings: (M, d).
            labels: (M,).
            prototypes: One vector for each class in the space of the embeddings, (C, d). The paper's are an MLP of the
                classifier's weights.
            queue: More labelled embeddings to contrast with, (K, d) and (K,), without a gradient.

        Returns:
            A scalar.
        """
        return self._mean(Batch(labels, logits, embeddings, queue, prototypes))


class PaCoLoss(_OfBoth):
    """Parametric contrastive learning (Cui et al. 2021, equation 4).

    Args:
        class_counts: Training images of each class, (C,).
        temperature: τ.
        kappa: κ: adds κ·log π to the logits.
        alpha: α, the weight of each positive embedding.
        beta: β, the weight of the class centre.
        normalized: The embeddings have unit norm already.
        gather: Contrast with the embeddings of all processes.
        validate: Check the values of the inputs.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        temperature: float = 0.07,
        kappa: float = 1.0,
        alpha: float = 0.05,
        beta: float = 1.0,
        *,
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        # Queue and averaged network are the caller's: `forward` takes the queue's content.
        config = checked_settings(
            PaCoConfig, kind="paco", temperature=temperature, kappa=kappa, alpha=alpha, beta=beta, queue=0, momentum=None
        )
        super().__init__(config, class_counts, normalized, gather, validate)


class HybridSCLoss(_Hybrid):
    """From supervised contrastive learning to classification in the course of a run (Wang et al. 2021, equation 4).

    α·SupCon on the embeddings + (1-α)·cross-entropy on the logits. The paper's logits are those of a second, class-balanced
    stream of images.

    Args:
        class_counts: Training images of each class, (C,).
        temperature: τ.
        curve: α over the run: 1-(t/T)², 1-t/T, half a cosine, or `share` throughout.
        share: α of the constant curve.
        kappa: κ: adds κ·log π to the logits.
        normalized: The embeddings have unit norm already.
        gather: Contrast with the embeddings of all processes.
        validate: Check the values of the inputs.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        temperature: float = 0.1,
        curve: Curve = "parabolic",
        share: float = 0.5,
        kappa: float = 0.0,
        *,
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        config = checked_settings(
            HybridSCConfig, kind="hybrid_sc", temperature=temperature, curve=curve, share=share, kappa=kappa
        )
        super().__init__(config, class_counts, normalized, gather, validate)
        self.register_parameter("prototypes", None)


class HybridPSCLoss(_Hybrid):
    """As `HybridSCLoss`, with learned prototypes: memory grows with the classes, not with the batch (Wang et al. 2021).

    The prototypes are parameters of this module: give them to the optimizer. Under DistributedDataParallel make the module part
    of the model.

    Args:
        class_counts: Training images of each class, (C,).
        size: d, the embeddings' dimensions.
        temperature: τ.
        curve: α over the run: 1-(t/T)², 1-t/T, half a cosine, or `share` throughout.
        share: α of the constant curve.
        kappa: κ: adds κ·log π to the logits.
        positive_in_denominator: Count the anchor's own prototype in the denominator, which the paper leaves out.
        normalized: The embeddings have unit norm already.
        validate: Check the values of the inputs.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        size: int,
        temperature: float = 0.1,
        curve: Curve = "parabolic",
        share: float = 0.5,
        kappa: float = 0.0,
        positive_in_denominator: bool = False,
        *,
        normalized: bool = False,
        validate: bool = True,
    ) -> None:
        config = checked_settings(
            HybridPSCConfig,
            kind="hybrid_psc",
            temperature=temperature,
            curve=curve,
            share=share,
            kappa=kappa,
            positive_in_denominator=positive_in_denominator,
        )
        super().__init__(config, class_counts, normalized, False, validate)
        self.prototypes, self.size = learned_prototypes(self.classes, size), size


class ProCoLoss(LossModule):
    """Probabilistic contrastive learning beside logit-adjusted cross-entropy (Du et al. 2024).

    The mean embedding of each class is a buffer of this module: save it with the model. Another `progress` begins an epoch.

    Args:
        class_counts: Training images of each class, (C,).
        size: d, the embeddings' dimensions, at least 16.
        temperature: τ.
        kappa: κ: adds κ·log π to both kinds of logits.
        contrastive_weight: Of the contrastive loss.
        normalized: The embeddings have unit norm already.
        gather: Estimate the classes from the embeddings of all processes.
        validate: Check the values of the inputs.
    """

    config: ProCoConfig

    def __init__(
        self,
        class_counts: ClassCounts,
        size: int,
        temperature: float = 0.1,
        kappa: float = 1.0,
        contrastive_weight: float = 1.0,
        *,
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        config = checked_settings(
            ProCoConfig, kind="proco", temperature=temperature, kappa=kappa, contrastive_weight=contrastive_weight
        )
        super().__init__(config, class_counts, normalized, gather, validate)
        check_whole("size", size, 1)
        if size < 16:
            raise ValueError(f"size is {size}; ProCo's distributions are computed for embeddings of 16 dimensions and more")
        self.class_means, self.size = ClassMeans(self.classes, size), size

    def forward(
        self,
        logits: torch.Tensor,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        classifier_labels: torch.Tensor | None = None,
        progress: float = 0.0,
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: Of the images that the classifier learns from, (N, C).
            embeddings: Of the other views, (M, d).
            labels: Of the embeddings, (M,).
            classifier_labels: Of the logits, (N,); None: `labels`.
            progress: Share of the run that is done, 0 to 1: epoch / epochs.

        Returns:
            A scalar.
        """
        second_stream = logits, labels if classifier_labels is None else classifier_labels
        return self._mean(Batch(labels, embeddings=embeddings, second_stream=second_stream, progress=progress))

    def _others(self, contrast: ContrastSet, progress: float) -> None:
        self.class_means.take(contrast.embeddings, contrast.labels, progress)

    def _loss(self, inputs: LossInputs, progress: float) -> torch.Tensor:
        assert inputs.second_stream is not None
        z, contrast = inputs.contrasted()
        config, (logits, labels) = self.config, inputs.second_stream
        means = self.class_means.take(contrast.embeddings, contrast.labels, progress)
        contrastive = probabilistic_contrastive(z, inputs.labels, means, self.log_prior, config.temperature, config.kappa)
        classified = cross_entropy(adjust_logits(logits, self.log_prior, config.kappa), labels)
        return config.contrastive_weight * contrastive.mean() + classified.mean()
