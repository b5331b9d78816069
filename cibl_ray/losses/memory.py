"""What outlives a step: embeddings of earlier batches with their labels, and each class's mean embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cibl_ray.losses.pairs import class_counts
from cibl_ray.losses.pairs.positives import class_sums
from pipelines.common.seeding import torch_seed


class LabelledQueue:
    """The last `size` embeddings (size, d) and their labels, a ring. Slots not yet written are never given out."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self.embeddings = torch.zeros(size, width, device=device)
        self.labels = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.written = 0

    def content(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (K, d) and labels (K,) of the K slots written so far. Copy them before the next push."""
        filled = min(self.written, len(self.labels))
        return self.embeddings[:filled], self.labels[:filled]

    def push(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Write over the oldest slots."""
        size = len(self.labels)
        embeddings, labels = embeddings.detach()[-size:], labels[-size:]
        slots = (self.written + torch.arange(len(labels), device=labels.device)) % size
        self.embeddings.index_copy_(0, slots, embeddings.to(self.embeddings.dtype))
        self.labels.index_copy_(0, slots, labels)
        self.written += len(labels)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the queue."""
        return {"embeddings": self.embeddings, "labels": self.labels, "written": torch.tensor(self.written)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take up the `state` of a checkpoint."""
        self.embeddings = state["embeddings"].to(self.embeddings.device)
        self.labels = state["labels"].to(self.labels.device)
        self.written = int(state["written"])


class ClassMeans(nn.Module):
    """The mean embedding of each class over the epoch before and this one so far, as ProCo estimates it.

    A class that has not been seen has a random mean of length .9, as in the authors' code. Nothing waits for the device.

    Args:
        classes: C.
        width: d.
    """

    means: torch.Tensor
    counts: torch.Tensor
    newer: torch.Tensor
    newer_counts: torch.Tensor
    unseen: torch.Tensor
    progress: torch.Tensor

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(torch_seed(0, "class means"))
        unseen = 0.9 * F.normalize(torch.randn(classes, width, generator=random), dim=1)
        self.register_buffer("unseen", unseen, persistent=False)
        for name in ("means", "newer"):  # newer: of this epoch alone
            self.register_buffer(name, unseen.clone())
        for name in ("counts", "newer_counts"):
            self.register_buffer(name, torch.zeros(classes))
        self.register_buffer("progress", torch.tensor(-1.0, dtype=torch.float64))

    @torch.no_grad()
    def take(self, embeddings: torch.Tensor, labels: torch.Tensor, progress: float) -> torch.Tensor:
        """Take in a step's embeddings.

        Args:
            embeddings: Of all workers, of unit norm, (A, d).
            labels: int64 (A,).
            progress: Share of the epochs done; with another than in the step before, an epoch begins.

        Returns:
            The means with these embeddings, (C, d), a copy.
        """
        begins = self.progress != progress
        self.means.copy_(torch.where(begins, self.newer, self.means))
        self.counts.copy_(torch.where(begins, self.newer_counts, self.counts))
        self.newer.copy_(torch.where(begins, self.unseen, self.newer))
        self.newer_counts.masked_fill_(begins, 0)
        self.progress.fill_(progress)
        classes = len(self.means)
        counts = class_counts(labels, classes).to(self.means.dtype)
        sums = class_sums(embeddings.detach().to(self.means.dtype), labels, classes)
        for means, total in ((self.means, self.counts), (self.newer, self.newer_counts)):
            total += counts
            means += (sums - counts[:, None] * means) / total.clamp(min=1)[:, None]
        return self.means.clone()
