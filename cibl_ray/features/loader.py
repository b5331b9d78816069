"""Features in memory as a loader's batches: the same orders, shares and draws as of images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from cibl_ray.config import RunConfig
from cibl_ray.features.extract import Extractor
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.loaders.cuts import epoch_order
from pipelines.loaders.reading import Batch, ReadPlan
from pipelines.prepare.prepared import Prepared


class FeatureLoader:
    """`Loader` whose batches hold features, float32 (B, V, d), in place of pixels.

    Each view of a sample is one of its K stored features, drawn again in every epoch.

    Args:
        features: float32 (N, K, d).
        labels: int64 (N,).
        plan: Order, batches and views.
        device: Where the batches are wanted.
        split: For messages.
        weights: How often data.sampling 'weighted' draws each sample, float64 (N,).

    Raises:
        UserError: There are fewer samples than a training batch has.
    """

    lasting = True
    name = "features in memory"

    def __init__(
        self,
        features: torch.Tensor,
        labels: np.ndarray,
        plan: ReadPlan,
        device: torch.device,
        split: str,
        weights: np.ndarray | None = None,
    ) -> None:
        self._features, self._plan, self._labels, self._weights = features.to(device), plan, labels, weights
        self._on_device = torch.from_numpy(labels.astype(np.int64)).to(device)
        self.samples = len(labels)
        self.batches = plan.batches(self.samples)
        if plan.drop_last and self.batches == 0:
            raise UserError(
                f"the {split} split has {self.samples} images, fewer than one batch of {plan.batch_size}; "
                "lower train.batch_size"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch`, from batch `start` on."""
        plan, kept = self._plan, self._features.shape[1]
        order = epoch_order(self._labels, plan.sampling, plan.seed, epoch, plan.weights, self._weights)
        positions = plan.positions(self.samples, start)
        views = len(plan.views) if plan.drop_last else 1
        if plan.drop_last and kept > 1:
            drawn = torch.from_numpy(stream(plan.seed, "feature views", epoch).integers(kept, size=(self.samples, views)))
        else:
            drawn = torch.zeros(self.samples, views, dtype=torch.int64)
        for first in range(0, len(positions), plan.own_batch):
            chosen = positions[first : first + plan.own_batch]
            rows = torch.from_numpy(order[chosen])
            there = rows.to(self._on_device.device)
            each = drawn[torch.from_numpy(chosen)].to(there.device)
            yield Batch(self._features[there[:, None], each], self._on_device[there], rows)

    def close(self) -> None:
        """Nothing is open."""


class FeatureLoaders:
    """Loaders of a run that trains a head: the features of every split, computed where they are not known yet.

    Args:
        backbone: With its weights, on `device`.
        config: The run's configuration, resolved for this machine (`hardware.resolve`).
        prepared: The images.
        device: Of the backbone and of the batches.
        world: Rank 0 computes first, so that the others of its machine find the features.
    """

    def __init__(self, backbone: nn.Module, config: RunConfig, prepared: Prepared, device: torch.device, world: World) -> None:
        self._config, self._prepared, self._device, self._world = config, prepared, device, world
        named = config.network.backbone
        self._extractor = Extractor(backbone, named.title, config.data, config.loader, device, code=named.code(backbone))
        self._features: dict[str, torch.Tensor] = {}

    def train(self, plan: ReadPlan) -> FeatureLoader:
        """Batches of the training split.

        Raises:
            UserError: The images do not have the weights that the plan's sampling needs.
        """
        if plan.sampling == "weighted":
            self._prepared.require_weights("train")
        return self._loader("train", plan)

    def evaluation(self, split: str, plan: ReadPlan) -> FeatureLoader:
        """Each sample of a split once, of features in float32."""
        return self._loader(split, plan)

    def features(self, split: str) -> torch.Tensor:
        """The features of a split, float32 (N, 1 + views, d), on the CPU."""
        if split not in self._features:
            train, views = self._config.train, self._config.train.feature_views if split == "train" else 0
            bf16 = split == "train" and train.precision == "bf16"

            def compute() -> torch.Tensor:
                return self._extractor.split(self._prepared, split, bf16, views, self._config.seed)

            if self._world.size > 1:
                self._world.broadcast_from_rank0(lambda: compute() is None)
            self._features[split] = self._world.work_together(compute)  # another machine computes its own
        return self._features[split]

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, int64 (N,)."""
        return self._prepared.beton(split).labels.astype(np.int64)

    def weights(self, split: str) -> np.ndarray | None:
        """How often data.sampling 'weighted' draws each image of a split, float64 (N,)."""
        return self._prepared.beton(split).weights

    def _loader(self, split: str, plan: ReadPlan) -> FeatureLoader:
        return FeatureLoader(self.features(split), self.labels(split), plan, self._device, split, self.weights(split))


class AsTheyAre(nn.Module):
    """What `Normalize` is for pixels: features (B, V, d) to (B·V, d)."""

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """The views of a sample next to each other."""
        return views.flatten(0, 1)
