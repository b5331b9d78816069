"""Modules of the losses that need logits alone."""

from __future__ import annotations

import torch

from cibl_ray.losses.balanced_softmax import BalancedSoftmaxConfig
from cibl_ray.losses.checks import check_positive, checked_settings
from cibl_ray.losses.cross_entropy import CrossEntropyConfig
from cibl_ray.losses.label_smoothing import LabelSmoothingConfig, Shape
from cibl_ray.losses.ldam import LDAMConfig
from cibl_ray.losses.modules.base import Batch, ClassCounts, LossModule
from cibl_ray.losses.vs import VSConfig


class _OfLogits(LossModule):
    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: (M, C).
            labels: (M,).

        Returns:
            A scalar.
        """
        return self._mean(Batch(labels, logits))


class CrossEntropyLoss(_OfLogits):
    """Plain cross-entropy, with the checks of this module.

    Args:
        class_counts: Training images of each class, (C,). Only their number matters.
        validate: Check the values of the inputs.
    """

    def __init__(self, class_counts: ClassCounts, *, validate: bool = True) -> None:
        super().__init__(checked_settings(CrossEntropyConfig, kind="cross_entropy"), class_counts, validate=validate)


class BalancedSoftmaxLoss(_OfLogits):
    """Balanced softmax, or logit adjustment: cross-entropy on f + κ·log π (Ren et al. 2020; Menon et al. 2021).

    Args:
        class_counts: Training images of each class, (C,).
        kappa: κ. 1 is balanced softmax, 0 cross-entropy.
        validate: Check the values of the inputs.
    """

    def __init__(self, class_counts: ClassCounts, kappa: float = 1.0, *, validate: bool = True) -> None:
        config = checked_settings(BalancedSoftmaxConfig, kind="balanced_softmax", kappa=kappa)
        super().__init__(config, class_counts, validate=validate)


class LDAMLoss(LossModule):
    """Label-distribution-aware margins with deferred re-weighting (Cao et al. 2019).

    Args:
        class_counts: Training images of each class, (C,).
        max_margin: Margin of the rarest class, in cosine.
        scale: s of the cosine classifier: its logits are s times a cosine.
        reweight_from: Share of the run after which classes are weighted by their effective number; 1: never.
        beta: β of the effective number of samples.
        validate: Check the values of the inputs.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        max_margin: float = 0.5,
        scale: float = 30.0,
        reweight_from: float = 0.8,
        beta: float = 0.9999,
        *,
        validate: bool = True,
    ) -> None:
        config = checked_settings(LDAMConfig, kind="ldam", max_margin=max_margin, reweight_from=reweight_from, beta=beta)
        super().__init__(config, class_counts, validate=validate)
        check_positive("scale", scale)
        self.scale = scale

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, progress: float = 0.0) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: s times cosines, (M, C).
            labels: (M,).
            progress: Share of the run that is done, 0 to 1: epoch / epochs.

        Returns:
            A scalar.
        """
        return self._mean(Batch(labels, logits, scale=self.scale, progress=progress))


class VSLoss(_OfLogits):
    """Vector scaling: cross-entropy on (n_c / n_max)^γ·f + κ·log π (Kini et al. 2021).

    Args:
        class_counts: Training images of each class, (C,).
        logit_gamma: γ. 0 is balanced softmax.
        kappa: κ.
        validate: Check the values of the inputs.
    """

    def __init__(
        self, class_counts: ClassCounts, logit_gamma: float = 0.15, kappa: float = 1.0, *, validate: bool = True
    ) -> None:
        config = checked_settings(VSConfig, kind="vs", logit_gamma=logit_gamma, kappa=kappa)
        super().__init__(config, class_counts, validate=validate)


class LabelSmoothingLoss(_OfLogits):
    """Cross-entropy against labels that are smoothed more the more common their class is (Zhong et al. 2021).

    Args:
        class_counts: Training images of each class, (C,).
        head_smoothing: ε of the most common class.
        tail_smoothing: ε of the rarest class.
        smoothing_shape: How ε grows with the images of a class.
        kappa: κ: adds κ·log π to the logits.
        validate: Check the values of the inputs.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        head_smoothing: float = 0.4,
        tail_smoothing: float = 0.1,
        smoothing_shape: Shape = "concave",
        kappa: float = 0.0,
        *,
        validate: bool = True,
    ) -> None:
        config = checked_settings(
            LabelSmoothingConfig,
            kind="label_smoothing",
            head_smoothing=head_smoothing,
            tail_smoothing=tail_smoothing,
            smoothing_shape=smoothing_shape,
            kappa=kappa,
        )
        super().__init__(config, class_counts, validate=validate)
