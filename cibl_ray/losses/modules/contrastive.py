"""Modules of the losses that train embeddings alone; a classifier needs a loss of its own."""

from __future__ import annotations

import torch

from cibl_ray.losses.checks import checked_settings, to_unit_norm
from cibl_ray.losses.inputs import LossInputs
from cibl_ray.losses.modules.base import Batch, ClassCounts, Labelled, LossModule, learned_prototypes
from cibl_ray.losses.psc import PSCConfig, psc
from cibl_ray.losses.supcon import SupConConfig, supcon


class SupConLoss(LossModule):
    """Supervised contrastive loss (Khosla et al. 2020, equation 2). It trains embeddings; a classifier needs a loss of its own.

    Args:
        class_counts: Training images of each class, (C,). Only their number matters.
        temperature: τ.
        normalized: The embeddings have unit norm already.
        gather: Contrast with the embeddings of all processes.
        validate: Check the values of the inputs.
    """

    config: SupConConfig

    def __init__(
        self,
        class_counts: ClassCounts,
        temperature: float = 0.1,
        *,
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        config = checked_settings(SupConConfig, kind="supcon", temperature=temperature)
        super().__init__(config, class_counts, normalized, gather, validate)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, queue: Labelled | None = None) -> torch.Tensor:
        """Compute the loss.

        Args:
            embeddings: (M, d).
            labels: (M,).
            queue: More labelled embeddings to contrast with, (K, d) and (K,), without a gradient.

        Returns:
            A scalar.
        """
        return self._mean(Batch(labels, embeddings=embeddings, queue=queue))

    def _loss(self, inputs: LossInputs, progress: float) -> torch.Tensor:
        z, contrast = inputs.contrasted()
        return supcon(z, inputs.labels, contrast, self.classes, self.config.temperature).mean()


class PSCLoss(LossModule):
    """Prototypical supervised contrastive loss (Wang et al. 2021, equation 7).

    The prototypes are parameters of this module: give them to the optimizer. Under DistributedDataParallel make the module part
    of the model.

    Args:
        class_counts: Training images of each class, (C,). Only their number matters.
        size: d, the embeddings' dimensions.
        temperature: τ.
        positive_in_denominator: Count the anchor's own prototype in the denominator, which the paper leaves out.
        normalized: The embeddings have unit norm already.
        validate: Check the values of the inputs.
    """

    config: PSCConfig

    def __init__(
        self,
        class_counts: ClassCounts,
        size: int,
        temperature: float = 0.1,
        positive_in_denominator: bool = False,
        *,
        normalized: bool = False,
        validate: bool = True,
    ) -> None:
        config = checked_settings(
            PSCConfig, kind="psc", temperature=temperature, positive_in_denominator=positive_in_denominator
        )
        super().__init__(config, class_counts, normalized, False, validate)
        self.prototypes, self.size = learned_prototypes(self.classes, size), size

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss, a scalar.

        Args:
            embeddings: (M, d).
            labels: Integers (M,).
        """
        return self._mean(Batch(labels, embeddings=embeddings, prototypes=to_unit_norm(self.prototypes)))

    def _loss(self, inputs: LossInputs, progress: float) -> torch.Tensor:
        z, prototypes = inputs.with_prototypes()
        return psc(z, inputs.labels, prototypes, self.config.temperature, self.config.positive_in_denominator).mean()
