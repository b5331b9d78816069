"""What a run costs: how many views pass through the network, forward and backward, or forward alone."""

from __future__ import annotations

from dataclasses import dataclass

from cibl_ray.config import RunConfig, one_view_epochs


@dataclass(frozen=True)
class Passes:
    """Views that pass through the network.

    Attributes:
        trained: Forward and backward.
        forward: Forward alone: the keys of an averaged network, and the first runs of cached micro-batches.
    """

    trained: int
    forward: int

    @property
    def equivalent(self) -> float:
        """In passes forward and backward: the backward pass costs two forward ones."""
        return self.trained + self.forward / 3


def passes(config: RunConfig, batches: int, epochs: float | None = None) -> Passes:
    """Count a run's passes.

    Args:
        config: The run's configuration.
        batches: Steps of an epoch.
        epochs: How many; None: all of them.

    Returns:
        The passes of all workers. A head that is trained on features (tune 'head') passes nothing through the backbone;
        a classifier that is trained on images (tune 'classifier') passes each forward alone.
    """
    train, needs = config.train, config.loss.needs
    if train.tune == "head":
        return Passes(0, 0)
    done = train.epochs if epochs is None else epochs
    images, count, alone = batches * train.batch_size, len(config.data.views), one_view_epochs(train)

    def views(until: float) -> float:
        return min(until, alone) + max(0.0, until - alone) * count

    sam = config.optimizer.sam
    once = done if sam is None else min(done, sam.start * train.epochs)  # from there on a step is two
    if train.tune == "classifier":
        return Passes(0, round(sum(images * (views(done) - views(since)) for since in (0, once))))
    keys = count - 1 if needs.momentum is not None else 0
    second = len(needs.second_stream.views) if needs.second_stream is not None else 0
    trained = sum(images * (views(done) - views(since) + (second - keys) * (done - since)) for since in (0, once))
    cached = trained if train.accumulate > 1 and train.contrast_set == "step" else 0.0
    return Passes(round(trained), round(images * keys * (2 * done - once) + cached))
