"""What all loss modules share: the class counts, the checks of their inputs, the contrast set of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cibl_ray.losses.base import LossSettings
from cibl_ray.losses.checks import (
    check_labels,
    check_matrix,
    check_progress,
    check_queue,
    check_tensor,
    check_values,
    check_whole,
    checked_counts,
    to_unit_norm,
)
from cibl_ray.losses.gather import Rows, agree_on_rows, gather
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs

ClassCounts = Sequence[float] | np.ndarray | torch.Tensor
Labelled = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """What a module's `forward` was given. None is what its method does not use.

    Attributes:
        labels: Of any integer type, (M,).
        logits: (M, C).
        embeddings: (M, d).
        queue: More embeddings to contrast with, (K, d), and their labels, (K,).
        prototypes: (C, d).
        second_stream: Logits (N, C) and labels (N,) of the images that a hybrid's classifier learns from.
        views: How many rows next to each other are views of one image.
        scale: s of a cosine classifier.
        progress: Share of the run that is done, 0 to 1.
    """

    labels: torch.Tensor
    logits: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    queue: Labelled | None = None
    prototypes: torch.Tensor | None = None
    second_stream: Labelled | None = None
    views: int = 1
    scale: float = 1.0
    progress: float = 0.0


class LossModule(nn.Module):
    """Base of all loss modules. A subclass builds its configuration; its `forward` fills a `Batch` and returns `_mean` of it.

    Args:
        config: The method's configuration, which computes its terms.
        class_counts: Training images of each class, (C,).
        normalized: The embeddings have unit norm already.
        gather: Contrast with the embeddings of all processes.
        validate: Check the values of the inputs.

    Attributes:
        size: d, where the module keeps tensors of that width; None: embeddings may have any.
    """

    size: int | None = None
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
        """The mean over the rows of `inputs`. A method whose configuration adds a classifier's loss overrides it."""
        return self.config.terms(inputs, ClassPrior(self.train_counts, self.log_prior), progress)["loss"]

    def _others(self, contrast: ContrastSet, progress: float) -> None:
        """Take in the rows of the other processes, where this one has none. A method that keeps a state overrides it."""

    def _mean(self, batch: Batch) -> torch.Tensor:
        """Check the inputs, gather what the embeddings are contrasted with, and compute the loss."""
        rows, error = None, None
        try:
            batch = self._checked(batch)
        except ValueError as refused:
            error = refused
        if self.gather:
            # Before this process raises: the others would wait for it.
            given = [each for each in (batch.labels, batch.logits, batch.embeddings) if isinstance(each, torch.Tensor)]
            device = given[0].device if given else self.train_counts.device
            rows = agree_on_rows(0 if error is not None else len(batch.labels), error, device)
        elif error is not None:
            raise error
        labels, second_stream = batch.labels, batch.second_stream
        all_labels = labels if rows is None else gather(labels, rows)
        embeddings = None if batch.embeddings is None else self._unit(batch.embeddings)
        prototypes = None if batch.prototypes is None else self._unit(batch.prototypes)
        contrast = None if embeddings is None else self._contrast(embeddings, all_labels, rows, batch.queue)
        if not len(labels) or (second_stream is not None and not len(second_stream[1])):
            # A zero that depends on every input, so that a backward pass finds the same graph as in the other processes.
            if contrast is not None:
                self._others(contrast, batch.progress)
            used = [batch.logits, prototypes, None if contrast is None else contrast.embeddings]
            used += [] if second_stream is None else [second_stream[0]]
            return torch.stack([0.0 * each.sum().float() for each in used if each is not None]).sum()
        inputs = LossInputs(
            logits=batch.logits if batch.logits is not None else labels.new_empty(0, self.classes, dtype=torch.float32),
            labels=labels,
            all_labels=all_labels,
            views=batch.views,
            embeddings=embeddings,
            contrast=contrast,
            prototypes=prototypes,
            scale=batch.scale,
            second_stream=second_stream,
        )
        loss = self._loss(inputs, batch.progress)
        return loss if rows is None else loss * rows.scale

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x (M, d) at unit norm."""
        return x if self.normalized else to_unit_norm(x)

    def _contrast(
        self, embeddings: torch.Tensor, all_labels: torch.Tensor, rows: Rows | None, queue: Labelled | None
    ) -> ContrastSet:
        """What the embeddings (M, d) are compared with: the rows of all processes, then the queue."""
        everyone, start = (embeddings, 0) if rows is None else (gather(embeddings, rows), rows.start)
        if queue is not None:
            everyone = torch.cat((everyone, self._unit(queue[0]).detach().to(everyone.dtype)))
            all_labels = torch.cat((all_labels, queue[1]))
        return ContrastSet(everyone, all_labels, start)

    def _checked(self, batch: Batch) -> Batch:
        """The batch with all labels as int64; ValueError for what does not fit."""
        needs, queue, second_stream = self.config.needs, batch.queue, batch.second_stream
        for name, given, used in (
            ("labels", batch.labels, True),
            ("embeddings", batch.embeddings, needs.projection),
            ("logits", batch.logits, second_stream is None and not needs.detached_head),
            ("prototypes", batch.prototypes, needs.prototypes is not None),
        ):
            if used or given is not None:
                check_tensor(name, given)
        rows = len(batch.labels) if batch.labels.ndim else 0
        for first in (batch.embeddings, batch.logits):
            rows = len(first) if first is not None and first.ndim else rows
        width: int | None = None
        floats, units, labels = {}, {}, {}
        if batch.logits is not None:
            check_matrix("logits", batch.logits, rows, self.classes)
            floats["logits"] = batch.logits
        if batch.embeddings is not None:
            check_matrix("embeddings", batch.embeddings, rows)
            floats["embeddings"] = units["embeddings"] = batch.embeddings
            width = batch.embeddings.shape[1]
            if self.size not in (None, width):
                raise ValueError(f"embeddings has shape {(rows, width)}, and size is {self.size}; give size={width}")
        labels["labels"] = check_labels("labels", batch.labels, rows)
        if batch.prototypes is not None:
            check_matrix("prototypes", batch.prototypes, self.classes, width)
            floats["prototypes"] = units["prototypes"] = batch.prototypes
        if queue is not None:
            check_queue(queue)
            check_matrix("queue[0]", queue[0], None, width)
            labels["queue[1]"] = check_labels("queue[1]", queue[1], len(queue[0]))
            floats["queue[0]"] = units["queue[0]"] = queue[0]
            queue = queue[0], labels["queue[1]"]
        if second_stream is not None:
            # Without labels of their own the logits are of the embeddings' images.
            check_matrix("logits", second_stream[0], rows if second_stream[1] is batch.labels else None, self.classes)
            labels["classifier_labels"] = check_labels("classifier_labels", second_stream[1], len(second_stream[0]))
            floats["logits"] = second_stream[0]
            second_stream = second_stream[0], labels["classifier_labels"]
        if rows % batch.views:
            hint = "put the views of an image next to each other"
            raise ValueError(f"{rows} rows are not divisible by views = {batch.views}; {hint}")
        check_progress(batch.progress)
        if self.validate:
            check_values(labels, floats, units if self.normalized else {}, self.classes)
        return Batch(
            labels=labels["labels"],
            logits=batch.logits,
            embeddings=batch.embeddings,
            queue=queue,
            prototypes=batch.prototypes,
            second_stream=second_stream,
            views=batch.views,
            scale=batch.scale,
            progress=batch.progress,
        )


def learned_prototypes(classes: int, size: int) -> nn.Parameter:
    """Random prototypes of unit norm, (classes, size), to be learned. ValueError: size is not 1 or more."""
    check_whole("size", size, 1)
    return nn.Parameter(F.normalize(torch.randn(classes, size), dim=1))
