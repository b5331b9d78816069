"""Scores of a run's network on the held-out splits."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cibl_ray.config import RunConfig
from cibl_ray.evaluation.metrics import Scores, score
from cibl_ray.evaluation.predict import predict
from cibl_ray.evaluation.tail_shift import choose_shift
from cibl_ray.hardware import enough_memory
from cibl_ray.networks.network import HybridNetwork
from cibl_ray.run.checkpoint import Checkpoint, load_checkpoint, load_weights
from cibl_ray.training.pauses import Pauses
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.loaders.reading import Loader
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates a network over all workers: each image once, the scores on rank 0.

    Args:
        config: The run's configuration.
        prepared: The images.
        loaders: The held-out splits, 'val' and 'test' where they exist.
        normalize: Turns what a loader gives into the network's input.
        world: The workers.
        pauses: Says before each batch whether the run is asked to stop.

    Attributes:
        outputs: Logits (N, C) and labels (N,) that `result` scored last; None before that.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        loaders: Mapping[str, Loader],
        normalize: nn.Module,
        world: World,
        pauses: Pauses,
    ) -> None:
        self.loaders = loaders
        self.outputs: tuple[torch.Tensor, torch.Tensor] | None = None
        self._config, self._prepared, self._normalize = config, prepared, normalize
        self._world, self._pauses = world, pauses

    def score(self, network: HybridNetwork, split: str, epoch: int) -> Scores | None:
        """Score a network.

        Args:
            network: The network, on the run's device.
            split: 'val' or 'test'.
            epoch: Epochs that it has been trained, for messages.

        Returns:
            The scores on rank 0; elsewhere None.

        Raises:
            UserError: The logits are not finite, or there is too little memory.
        """
        return self._score(*self.predict(network, split), split, epoch)

    def result(self, network: HybridNetwork, epoch: int, is_best: bool, best: Path | None) -> dict[str, Any]:
        """Score the last epoch and the best one. The test set is looked at here for the first time, and chooses nothing.

        Args:
            network: The last epoch's network. Its weights are replaced by the best epoch's.
            epoch: The last epoch.
            is_best: Whether its weights are those of the best epoch on validation; rank 0 knows.
            best: The checkpoint of the best epoch, where its weights are others; rank 0 knows.

        Returns:
            On rank 0 the split, and 'last' and 'best' with epoch, scores and chosen tail shift; elsewhere an empty dict.
        """
        split = "test" if "test" in self._prepared.splits else "val"
        result: dict[str, Any] = {"split": split, "last": self._result(network, split, epoch)}
        if is_best:
            result["best"] = result["last"]
        other = self._world.broadcast_from_rank0(lambda: _readable(best) if best is not None else None)
        if other is not None and _loaded(network, other):
            result["best"] = self._result(network, split, other.epoch)
        return result if self._world.is_rank0 else {}

    def close(self) -> None:
        """Close the loaders."""
        for loader in self.loaders.values():
            loader.close()

    def _result(self, network: HybridNetwork, split: str, epoch: int) -> dict[str, Any]:
        """What the result says of a network, with the tail shift that validation images choose."""
        logits, labels = self.outputs = self.predict(network, split)
        result: dict[str, Any] = {"epoch": epoch, "scores": self._score(logits, labels, split, epoch)}
        if "val" in self._prepared.splits and split != "val":
            logits, labels = self.predict(network, "val")
            if self._world.is_rank0:
                result["tail_shift"] = choose_shift(logits, labels, self._prepared.train_counts)
        return result

    def predict(self, network: HybridNetwork, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify a split, each image once over all workers.

        Args:
            network: The network, on the run's device.
            split: 'val' or 'test'.

        Returns:
            Logits (N, C) and labels (N,) of the whole split on rank 0; elsewhere empty ones.

        Raises:
            KeyboardInterrupt: A worker is asked to stop.
        """
        train = self._config.train
        with enough_memory(f"evaluation, {train.eval_batch_size} images at once", "lower train.eval_batch_size"):
            device = torch.device(train.device)
            logits, labels = self._pauses.together(
                lambda: predict(network, self.loaders[split], self._normalize, device, self._pauses.raise_if_stopped)
            )
        return self._world.gather_to_rank0(logits), self._world.gather_to_rank0(labels)

    def _score(self, logits: torch.Tensor, labels: torch.Tensor, split: str, epoch: int) -> Scores | None:
        scores = score(logits, labels, self._prepared.train_counts) if self._world.is_rank0 else None
        # Training uses each batch's statistics and may stay finite. Running statistics that are not finite stay so.
        if scores is not None and not math.isfinite(scores.loss):
            raise UserError(
                f"the loss is not finite on the {split} split after epoch {epoch}, though it is in training; lower "
                f"optimizer.lr (it is {self._config.optimizer.lr}), set optimizer.clip_norm, or train.precision: fp32; "
                "earlier checkpoints are kept"
            )
        return scores


def _readable(path: Path) -> Checkpoint | None:
    """The best checkpoint, where it is whole: the last one's scores do not depend on it."""
    try:
        return load_checkpoint(path)
    except UserError as error:
        log.warning("%s; the result is the last epoch's alone", error)
        return None


def _loaded(network: HybridNetwork, best: Checkpoint) -> bool:
    """Load the best checkpoint's weights, where they are of this network: the file may be another run's."""
    try:
        load_weights(network, best)
    except UserError as error:
        log.warning("the best checkpoint: %s; the result is the last epoch's alone", error)
        return False
    return True
