"""What outlives a step: embeddings of earlier batches, with their labels."""

from __future__ import annotations

import torch


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
