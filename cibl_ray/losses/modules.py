"""Every method's loss as a `torch.nn.Module`, for a plain loop, Lightning, timm or accelerate.

A module takes logits (M, C), embeddings (M, d) and labels (M,), or those of them that its method uses, and returns a scalar in
float32 (float64 for float64 inputs). The M rows are all views of all images of a step, in any order.

All modules share these rules:

- Labels are of any integer type, from 0 to C-1. Logits and embeddings are floats of any precision; under autocast the loss
  itself is computed in float32.
- Embeddings are normalised to unit norm. With `normalized=True` they must have it already.
- Wrong shapes, types, labels and values that are not finite raise ValueError. Checking values waits for the device once a step;
  `validate=False` leaves it out.
- A batch without rows has the loss 0. A class whose count is 0 counts as one image.
- With `gather=True` the embeddings are contrasted with those of all processes of the default process group, with exact
  gradients. DistributedDataParallel's average is then the gradient of the mean over all rows of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cibl_ray.losses.balanced_softmax import BalancedSoftmaxConfig
from cibl_ray.losses.base import LossSettings
from cibl_ray.losses.bcl import BCLConfig
from cibl_ray.losses.checks import check_labels, check_matrix, check_values, checked_counts, to_unit_norm
from cibl_ray.losses.cibl import CIBLConfig, Normalization
from cibl_ray.losses.cross_entropy import CrossEntropyConfig
from cibl_ray.losses.gather import Rows, agree_on_rows, gather
from cibl_ray.losses.hybrid import Curve, HybridPSCConfig, HybridSCConfig
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs
from cibl_ray.losses.label_smoothing import LabelSmoothingConfig, Shape
from cibl_ray.losses.ldam import LDAMConfig
from cibl_ray.losses.paco import PaCoConfig
from cibl_ray.losses.psc import PSCConfig, psc
from cibl_ray.losses.supcon import SupConConfig, supcon
from cibl_ray.losses.vs import VSConfig

ClassCounts = Sequence[float] | np.ndarray | torch.Tensor
Labelled = tuple[torch.Tensor, torch.Tensor]


class _Loss(nn.Module):
    """What all loss modules share: the class counts, the checks, the contrast set.

    Args:
        config: The method's configuration, which computes its terms.
        class_counts: Training images of each class, (C,).
        normalized: The embeddings have unit norm already.
        gather: Contrast with the embeddings of all processes.
        validate: Check the values of the inputs.
    """

    train_counts: torch.Tensor
    log_prior: torch.Tensor

    def __init__(
        self,
        config: LossSettings,
        class_counts: ClassCounts,
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.normalized, self.gather, self.validate = config, normalized, gather, validate
        prior = ClassPrior.of(checked_counts(class_counts))
        self.register_buffer("train_counts", prior.train_counts, persistent=False)
        self.register_buffer("log_prior", prior.log_prior, persistent=False)

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self.train_counts)

    def extra_repr(self) -> str:
        """The classes and the method's settings, for `print`."""
        settings = {"classes": self.classes} | self.config.model_dump(exclude={"kind", "classify", "queue", "momentum"})
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    def _loss(self, inputs: LossInputs, progress: float) -> torch.Tensor:
        """The mean over the rows of `inputs`."""
        return self.config.terms(inputs, ClassPrior(self.train_counts, self.log_prior), progress)["loss"]

    def _mean(
        self,
        labels: torch.Tensor,
        logits: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        queue: Labelled | None = None,
        prototypes: torch.Tensor | None = None,
        classified: Labelled | None = None,
        views: int = 1,
        scale: float = 1.0,
        progress: float = 0.0,
    ) -> torch.Tensor:
        """Check the inputs, gather what the embeddings are contrasted with, and compute the loss."""
        error = None
        try:
            labels, queue, classified = self._check(labels, logits, embeddings, queue, prototypes, classified, views, progress)
        except ValueError as refused:
            error = refused
        rows: Rows | None = None
        if self.gather:
            # Before anything fails: the other processes would wait for this one.
            rows = agree_on_rows(len(labels) if labels.ndim else 0, error, labels.device)
        elif error is not None:
            raise error
        if embeddings is not None:
            embeddings = to_unit_norm(embeddings) if not self.normalized else embeddings
        if prototypes is not None:
            prototypes = to_unit_norm(prototypes) if not self.normalized else prototypes
        all_labels, contrast = labels, None
        if embeddings is not None:
            everyone, start = embeddings, 0
            if rows is not None:
                everyone, all_labels, start = gather(embeddings, rows), gather(labels, rows), rows.start
            contrast_labels = all_labels
            if queue is not None:
                others = queue[0] if self.normalized else to_unit_norm(queue[0])
                everyone = torch.cat((everyone, others.detach().to(everyone.dtype)))
                contrast_labels = torch.cat((all_labels, queue[1]))
            contrast = ContrastSet(everyone, contrast_labels, start)
        if not len(labels) or (classified is not None and not len(classified[1])):
            # Joined to every input, so that a backward pass finds the same graph as in the other processes.
            used = [logits, prototypes]
            used += [contrast.embeddings] if contrast is not None else []
            used += [classified[0]] if classified is not None else []
            return torch.stack([0.0 * each.sum().float() for each in used if each is not None]).sum()
        inputs = LossInputs(
            logits=logits if logits is not None else labels.new_empty(0, self.classes, dtype=torch.float32),
            labels=labels,
            all_labels=all_labels,
            views=views,
            embeddings=embeddings,
            contrast=contrast,
            prototypes=prototypes,
            scale=scale,
            second_stream=classified,
        )
        loss = self._loss(inputs, progress)
        return loss if rows is None else loss * rows.scale

    def _check(
        self,
        labels: torch.Tensor,
        logits: torch.Tensor | None,
        embeddings: torch.Tensor | None,
        queue: Labelled | None,
        prototypes: torch.Tensor | None,
        classified: Labelled | None,
        views: int,
        progress: float,
    ) -> tuple[torch.Tensor, Labelled | None, Labelled | None]:
        """Raise ValueError for what does not fit; return all labels as int64."""
        first = logits if logits is not None else embeddings
        rows = len(first) if first is not None and first.ndim else 0
        floats: dict[str, torch.Tensor] = {}
        units: dict[str, torch.Tensor] = {}
        if logits is not None:
            check_matrix("logits", logits, rows, self.classes)
            floats["logits"] = logits
        if embeddings is not None:
            check_matrix("embeddings", embeddings, rows)
            floats["embeddings"] = units["embeddings"] = embeddings
        labels = check_labels("labels", labels, rows)
        named = {"labels": labels}
        if prototypes is not None:
            check_matrix("prototypes", prototypes, self.classes, embeddings.shape[1] if embeddings is not None else None)
            floats["prototypes"] = units["prototypes"] = prototypes
        if queue is not None:
            check_matrix("queue[0]", queue[0], None, embeddings.shape[1] if embeddings is not None else None)
            queue = queue[0], check_labels("queue[1]", queue[1], len(queue[0]))
            floats["queue[0]"] = units["queue[0]"] = queue[0]
            named["queue[1]"] = queue[1]
        if classified is not None:
            check_matrix("logits", classified[0], None, self.classes)
            classified = classified[0], check_labels("classifier_labels", classified[1], len(classified[0]))
            floats["logits"], named["classifier_labels"] = classified
        if rows % views:
            raise ValueError(f"{rows} rows are not divisible by views = {views}; put the views of an image next to each other")
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}; give the share of the run that is done, 0 to 1")
        if self.validate:
            check_values(named, floats, units if self.normalized else {}, self.classes)
        return labels, queue, classified


class CrossEntropyLoss(_Loss):
    """Plain cross-entropy, with the checks of this module.

    Args:
        class_counts: Training images of each class, (C,). Only their number matters.
        validate: Check the values of the inputs.
    """

    def __init__(self, class_counts: ClassCounts, *, validate: bool = True) -> None:
        super().__init__(CrossEntropyConfig(kind="cross_entropy"), class_counts, validate=validate)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of logits (M, C) and labels (M,)."""
        return self._mean(labels, logits)


class BalancedSoftmaxLoss(_Loss):
    """Balanced softmax, or logit adjustment: cross-entropy on f + κ·log π (Ren et al. 2020; Menon et al. 2021).

    Args:
        class_counts: Training images of each class, (C,).
        kappa: κ. 1 is balanced softmax, 0 cross-entropy.
        validate: Check the values of the inputs.
    """

    def __init__(self, class_counts: ClassCounts, kappa: float = 1.0, *, validate: bool = True) -> None:
        super().__init__(BalancedSoftmaxConfig(kind="balanced_softmax", kappa=kappa), class_counts, validate=validate)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of logits (M, C) and labels (M,)."""
        return self._mean(labels, logits)


class LDAMLoss(_Loss):
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
        config = LDAMConfig(kind="ldam", max_margin=max_margin, reweight_from=reweight_from, beta=beta)
        super().__init__(config, class_counts, validate=validate)
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
        return self._mean(labels, logits, scale=self.scale, progress=progress)


class VSLoss(_Loss):
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
        super().__init__(VSConfig(kind="vs", logit_gamma=logit_gamma, kappa=kappa), class_counts, validate=validate)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of logits (M, C) and labels (M,)."""
        return self._mean(labels, logits)


class LabelSmoothingLoss(_Loss):
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
        config = LabelSmoothingConfig(
            kind="label_smoothing",
            head_smoothing=head_smoothing,
            tail_smoothing=tail_smoothing,
            smoothing_shape=smoothing_shape,
            kappa=kappa,
        )
        super().__init__(config, class_counts, validate=validate)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of logits (M, C) and labels (M,)."""
        return self._mean(labels, logits)


class SupConLoss(_Loss):
    """Supervised contrastive loss (Khosla et al. 2020, equation 2). It trains embeddings; a classifier needs a loss of its own.

    Args:
        class_counts: Training images of each class, (C,). Only their number matters.
        temperature: τ.
        normalized: The embeddings have unit norm already.
        gather: Contrast with the embeddings of all processes.
        validate: Check the values of the inputs.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        temperature: float = 0.1,
        *,
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        super().__init__(SupConConfig(kind="supcon", temperature=temperature), class_counts, normalized, gather, validate)
        self._temperature = temperature

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, queue: Labelled | None = None) -> torch.Tensor:
        """Compute the loss.

        Args:
            embeddings: (M, d).
            labels: (M,).
            queue: More labelled embeddings to contrast with, (K, d) and (K,), without a gradient.

        Returns:
            A scalar.
        """
        return self._mean(labels, embeddings=embeddings, queue=queue)

    def _loss(self, inputs: LossInputs, progress: float) -> torch.Tensor:
        z, contrast = inputs.contrasted()
        return supcon(z, inputs.labels, contrast, self.classes, self._temperature).mean()


class PSCLoss(_Loss):
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
        config = PSCConfig(kind="psc", temperature=temperature, positive_in_denominator=positive_in_denominator)
        super().__init__(config, class_counts, normalized, False, validate)
        self._temperature, self._positive = temperature, positive_in_denominator
        self.prototypes = nn.Parameter(F.normalize(torch.randn(self.classes, size), dim=1))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of embeddings (M, d) and labels (M,)."""
        return self._mean(labels, embeddings=embeddings, prototypes=to_unit_norm(self.prototypes))

    def _loss(self, inputs: LossInputs, progress: float) -> torch.Tensor:
        z, prototypes = inputs.with_prototypes()
        return psc(z, inputs.labels, prototypes, self._temperature, self._positive).mean()


class HybridSCLoss(_Loss):
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
        config = HybridSCConfig(kind="hybrid_sc", temperature=temperature, curve=curve, share=share, kappa=kappa)
        super().__init__(config, class_counts, normalized, gather, validate)

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
        classified = logits, labels if classifier_labels is None else classifier_labels
        return self._mean(labels, embeddings=embeddings, classified=classified, progress=progress)


class HybridPSCLoss(_Loss):
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
        config = HybridPSCConfig(
            kind="hybrid_psc",
            temperature=temperature,
            curve=curve,
            share=share,
            kappa=kappa,
            positive_in_denominator=positive_in_denominator,
        )
        super().__init__(config, class_counts, normalized, False, validate)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(self.classes, size), dim=1))

    def forward(
        self,
        logits: torch.Tensor,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        classifier_labels: torch.Tensor | None = None,
        progress: float = 0.0,
    ) -> torch.Tensor:
        """Compute the loss; arguments as in `HybridSCLoss.forward`."""
        classified = logits, labels if classifier_labels is None else classifier_labels
        prototypes = to_unit_norm(self.prototypes)
        return self._mean(labels, embeddings=embeddings, prototypes=prototypes, classified=classified, progress=progress)


class BCLLoss(_Loss):
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
        config = BCLConfig(
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
        return self._mean(labels, logits, embeddings, queue, prototypes)


class PaCoLoss(_Loss):
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
        config = PaCoConfig(kind="paco", temperature=temperature, kappa=kappa, alpha=alpha, beta=beta, queue=0, momentum=None)
        super().__init__(config, class_counts, normalized, gather, validate)

    def forward(
        self, logits: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor, queue: Labelled | None = None
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: (M, C).
            embeddings: (M, d).
            labels: (M,).
            queue: More labelled embeddings to contrast with, (K, d) and (K,), without a gradient: the paper's MoCo queue.

        Returns:
            A scalar.
        """
        return self._mean(labels, logits, embeddings, queue)


class CIBLLoss(_Loss):
    """Class instance balanced loss: mean of (1-w)·CE + w·SupCon, w = λ·|P|/(1 + λ·|P|) (Lavoie & Waslander 2023).

    |P| counts the other rows of the same class in the contrast set. The weight is our reading of the paper's abstract.

    Args:
        class_counts: Training images of each class, (C,). They matter where kappa is not 0; their number always does.
        tail_skew: λ. 0 is cross-entropy; more moves accuracy to the rare classes.
        temperature: τ.
        kappa: κ: adds κ·log π to the logits.
        normalize: What the weights are divided by: "none"; "batch", so that 1-w has mean 1 over the batch; or "class", the mean
            over the classes of each class's mean.
        views: V > 1: cross-entropy sees the rows 0, V, 2V, ... alone, the first view of each image.
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
        normalized: bool = False,
        gather: bool = False,
        validate: bool = True,
    ) -> None:
        classify: Literal["all", "first"] = "first" if views > 1 else "all"
        config = CIBLConfig(tail_skew=tail_skew, temperature=temperature, kappa=kappa, normalize=normalize, classify=classify)
        super().__init__(config, class_counts, normalized, gather, validate)
        self.views = views

    def forward(
        self, logits: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor, queue: Labelled | None = None
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: (M, C).
            embeddings: (M, d).
            labels: (M,).
            queue: More labelled embeddings to contrast with, (K, d) and (K,), without a gradient.

        Returns:
            A scalar.
        """
        return self._mean(labels, logits, embeddings, queue, views=self.views)
