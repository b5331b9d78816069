"""The inputs of a loss: a step's outputs of the network, and the class counts of the training set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Terms = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class ContrastSet:
    """The labelled embeddings that the anchors are compared with: the batch, other workers' batches, a queue.

    The anchors themselves are among them, as the rows start, start+1, ...; no anchor is compared with itself.

    Attributes:
        embeddings: (A, d) of unit norm.
        labels: int64 (A,).
        start: Row of the first anchor.
    """

    embeddings: torch.Tensor
    labels: torch.Tensor
    start: int = 0

    def rows_of(self, anchors: torch.Tensor) -> torch.Tensor:
        """The rows of anchors (M, d) themselves, int64 (M,)."""
        import torch

        return torch.arange(self.start, self.start + len(anchors), device=anchors.device)


@dataclass(frozen=True)
class LossInputs:
    """One step's images as the network sees them.

    Attributes:
        logits: (M, C), the V views of a sample next to each other.
        labels: int64 (M,), of the same rows.
        all_labels: The labels of all workers' rows.
        views: V.
        embeddings: (M, d) of unit norm; None for a loss that needs no projection.
        contrast: What the embeddings are compared with; None for a loss that needs no contrast set.
        prototypes: (C, d) of unit norm; None for a loss that needs none.
        scale: The scale s of a cosine head, else 1.
        second_stream: Logits and labels of the second stream of images; None for a loss that needs none.
        class_means: Called with embeddings (A, d), their labels (A,) and the progress, it takes them in, and returns the mean
            of each class, (C, d); None for a loss that needs none.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    all_labels: torch.Tensor
    views: int = 1
    embeddings: torch.Tensor | None = None
    contrast: ContrastSet | None = None
    prototypes: torch.Tensor | None = None
    scale: torch.Tensor | float = 1.0
    second_stream: tuple[torch.Tensor, torch.Tensor] | None = None
    class_means: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None

    def contrasted(self) -> tuple[torch.Tensor, ContrastSet]:
        """Embeddings and contrast set of a loss that needs both."""
        assert self.embeddings is not None
        assert self.contrast is not None
        return self.embeddings, self.contrast

    def contrasted_others(self) -> tuple[torch.Tensor, torch.Tensor, ContrastSet]:
        """Embeddings, labels and contrast set of every view but the first, for a loss without a queue."""
        z, contrast = self.contrasted()
        kept, labels = self._but_first(z), self._but_first(self.labels)
        if contrast.embeddings is z:
            return kept, labels, ContrastSet(kept, labels)
        start = contrast.start // self.views * (self.views - 1)
        return kept, labels, ContrastSet(self._but_first(contrast.embeddings), self._but_first(contrast.labels), start)

    def _but_first(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (-1, self.views))[:, 1:].flatten(0, 1)

    def with_prototypes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and prototypes of a loss that needs both."""
        assert self.embeddings is not None
        assert self.prototypes is not None
        return self.embeddings, self.prototypes


@dataclass(frozen=True)
class ClassPrior:
    """The class frequencies of the training set.

    Attributes:
        train_counts: Images of each class, (C,).
        log_prior: log π, π_c = n_c / Σn, (C,) in the logits' type. A class without images counts as one image.
    """

    train_counts: torch.Tensor
    log_prior: torch.Tensor

    @classmethod
    def of(cls, train_counts: torch.Tensor, dtype: torch.dtype | None = None) -> ClassPrior:
        """The prior of a training set.

        Args:
            train_counts: Images of each class, (C,).
            dtype: Of `log_prior`; None: float32.
        """
        counts = train_counts.double().clamp(min=1)
        log_prior = (counts / counts.sum()).log()
        return cls(train_counts, log_prior.float() if dtype is None else log_prior.to(dtype))
