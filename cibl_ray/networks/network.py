"""The hybrid network: one backbone, a classifier, and a projection where the loss contrasts embeddings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cibl_ray.networks.adapters import AdaptedBackbone
from cibl_ray.networks.config import Needs, NetworkConfig, PartialConfig
from cibl_ray.networks.depth import frozen_modules
from cibl_ray.networks.modules import Head, LearnedPrototypes, Neck, ProjectedPrototypes, Projection
from cibl_ray.networks.precision import at_least_float32
from pipelines.common.seeding import torch_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """What the network makes of M images, in at least float32.

    Attributes:
        logits: (M, C).
        embeddings: (M, d_z) of unit norm; None where the network has no projection.
        prototypes: (C, d_z) of unit norm; None where the network has none.
        scale: The head's scale s; 1 where it has none.
    """

    logits: torch.Tensor
    embeddings: torch.Tensor | None
    prototypes: torch.Tensor | None
    scale: torch.Tensor | float


class HybridNetwork(nn.Module):
    """Images (M, 3, S, S) to `Outputs`.

    Args:
        config: Backbone, head and projection.
        classes: C.
        needs: What the loss asks for beside logits.
        image_size: S; None: not known.
    """

    def __init__(self, config: NetworkConfig, classes: int, needs: Needs, image_size: int | None = None) -> None:
        super().__init__()
        self._still: list[str] = []  # names: the modules may be replaced, as by `sync_batch_norm`
        self._adapted: AdaptedBackbone | None = None
        self.classes, self.detached_head = classes, needs.detached_head
        self.backbone, features = config.backbone.build_for(image_size)
        self.neck: nn.Module | None = None
        if config.neck is not None:
            self.neck = Neck(features, config.neck.hidden, config.neck.dropout)
            features = config.neck.hidden
        self.head = Head(config.head, features, classes)
        self.projection: Projection | None = None
        self.prototypes: LearnedPrototypes | ProjectedPrototypes | None = None
        mlp = config.projection
        if needs.projection:
            self.projection = Projection(features, mlp.hidden, mlp.size, mlp.norm)
        match needs.prototypes:
            case "learned":
                self.prototypes = LearnedPrototypes(classes, mlp.size)
            case "projected":
                self.prototypes = ProjectedPrototypes(features, mlp.hidden, mlp.size, mlp.norm)

    def forward(self, x: torch.Tensor) -> Outputs:
        """Everything that a loss may need of images (M, 3, S, S), or of the backbone's features of them (M, d)."""
        h = self.features(x)
        return Outputs(
            logits=at_least_float32(self.head(h.detach() if self.detached_head else h)),
            embeddings=self.projection(h) if self.projection is not None else None,
            prototypes=self.prototypes(self.head.weight) if self.prototypes is not None else None,
            scale=self.head.scale,
        )

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the head sees, (M, d_h), of images (M, 3, S, S), or of the backbone's features of them (M, d)."""
        h = x if x.ndim == 2 else self.backbone(x)
        return h if self.neck is None else self.neck(h)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits alone, (M, C), in at least float32: what evaluation and serving need."""
        return at_least_float32(self.head(self.features(x)))

    def freeze(
        self,
        tune: Literal["head", "classifier", "partial", "full"],
        partial: PartialConfig,
        keep_statistics: bool = False,
        seed: int = 0,
    ) -> None:
        """Choose what of the network is trained. Frozen batch norm keeps its statistics in training mode, too.

        Args:
            tune: Nothing of the backbone, the head alone on the backbone's images, a part of the backbone, or all of it.
            partial: Which part.
            keep_statistics: Whether batch norm that is trained, or with "classifier" all of it, keeps its running statistics
                and computes with them.
            seed: Of the first weights of adapters.

        Raises:
            UserError: Adapters are asked for, and the backbone cannot have any.
        """
        match tune:
            case "head":
                self.backbone.requires_grad_(False)
            case "classifier":
                self.requires_grad_(False)
                self.head.requires_grad_(True)
            case "partial":
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(torch_seed(seed, "adapters"))
                    self._adapted = partial.freeze(self.backbone)
            case "full":
                self.backbone.requires_grad_(True)
        # A ViT's tokens are parameters of the backbone itself, whose name among its own modules is ''.
        self._still = [f"backbone.{name}".rstrip(".") for name in frozen_modules(self.backbone, keep_statistics)]
        if tune == "classifier":
            if not keep_statistics:  # they are estimated again, on the images of this stage
                self._still = [name for name in self._still if getattr(self.get_submodule(name), "running_mean", None) is None]
            self._still += [] if self.neck is None else [f"neck.{name}".rstrip(".") for name, _ in self.neck.named_modules()]

    def merge_adapters(self) -> None:
        """Add adapters to the weights that they adapt, where `freeze` made some: then the network is as it was built."""
        if self._adapted is not None:
            self._adapted.merge()
            self._adapted, self._still = None, []
            self.backbone.requires_grad_(True)

    def train(self, mode: bool = True) -> HybridNetwork:
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for name in self._still:
            self.get_submodule(name).training = False
        return self

    def classifying_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of what classifies: backbone, neck and head. A projection and prototypes serve training alone."""
        for part in (self.backbone, self.neck, self.head):
            if part is not None:
                yield from part.parameters()

    def schedule(self, epoch: float, epochs: int) -> None:
        """Set what changes over a run of `epochs`: the head's scale, where a schedule sets it."""
        scale = self.head.config.scale_at(epoch, epochs)
        if scale is not None:
            self.head.set_scale(scale)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the parameter `name`: not to a learned scale, which it would pull to 1."""
        return name != "head.log_scale"


def build_network(
    config: NetworkConfig, classes: int, needs: Needs, seed: int, pretrained: bool = False, image_size: int | None = None
) -> HybridNetwork:
    """Build a network with weights drawn from `seed`, channels last in memory.

    Projection and prototypes are drawn last, so that networks with and without them start from the same backbone and
    classifier. torch's global generator is left as it was.

    Args:
        config: Backbone, head and projection.
        classes: C.
        needs: What the loss asks for beside logits.
        seed: Of the random weights.
        pretrained: Load the backbone's pretrained weights, where the configuration names some.
        image_size: `data.size`, for a network of the user's own that takes no other; None: not known.

    Returns:
        The network, on the CPU.

    Raises:
        UserError: The pretrained weights cannot be had, or are of another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "weights"))
        network = HybridNetwork(config, classes, needs, image_size)
    if pretrained and (source := config.backbone.load(network.backbone)) is not None:
        of_backbone, all_of_it = (sum(p.numel() for p in part.parameters()) for part in (network.backbone, network))
        log.info("%s: %s parameters from %s", config.backbone.title, f"{of_backbone:,}", source)
        log.info("heads: %s parameters are new", f"{all_of_it - of_backbone:,}")
    return network.to(memory_format=torch.channels_last)
