"""What `network:` in a configuration may say, and what a network can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_serializer

from cibl_ray.networks.backbones.config import AnyBackbone, BackboneConfig, ResNet32Backbone, dump
from cibl_ray.networks.heads.cosine import CosineHeadConfig
from cibl_ray.networks.heads.linear import LinearHeadConfig
from pipelines.common.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from cibl_ray.networks.adapters import AdaptedBackbone

HeadConfig = Annotated[
    LinearHeadConfig
    | CosineHeadConfig,
    Field(discriminator="kind"),
]  # fmt: skip


class ProjectionConfig(Settings):
    """The MLP before the contrastive loss: d_h -> hidden -> size, of unit norm."""

    hidden: int = Field(default=512, ge=1, description="Width of the hidden layer.")
    size: int = Field(default=128, ge=1, description="Dimensions of the embedding.")
    norm: bool = Field(default=False, description="Batch norm after the hidden layer, also in the MLP of BCL's prototypes.")


class NeckConfig(Settings):
    """A layer between backbone and head: d -> hidden, ReLU. With a frozen backbone it is what contrastive losses shape."""

    hidden: int = Field(default=512, ge=1, description="Width of the layer.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the backbone's features that training leaves out.")


class NetworkConfig(Settings):
    """Backbone, classification head, and the projection for losses that contrast embeddings."""

    backbone: AnyBackbone = Field(default=ResNet32Backbone(), description="The network before the head.")
    neck: NeckConfig | None = Field(default=None, description="A trained layer after the backbone; null: none.")
    head: HeadConfig = LinearHeadConfig()
    projection: ProjectionConfig = ProjectionConfig()

    @field_serializer("backbone")
    def _short(self, backbone: BackboneConfig) -> Any:
        return dump(backbone)

    def check(self, image_size: int, chosen: bool, epochs: int) -> None:
        """Refuse what does not fit the images or the length of the run.

        Args:
            image_size: `data.size`.
            chosen: Whether the configuration says it. If not, it will be that of pretrained weights, where there are any.
            epochs: Of the run.

        Raises:
            ValueError: One line that names the field, its value and the fix.
        """
        smallest = self.backbone.min_size
        if image_size < smallest and (chosen or self.backbone.input_rule() is None):
            raise ValueError(
                f"network.backbone {self.backbone.title!r} takes images of {smallest} pixels and more, data.size is "
                f"{image_size}; set it (--data.size 224 for photographs), or use resnet20 or resnet32 for small images"
            )
        if epochs:
            self.head.check(epochs)


class LastBlocks(Settings):
    """Train the last blocks of the backbone: stages of a convolutional network, layers of a transformer."""

    kind: Literal["blocks"] = "blocks"
    count: int = Field(default=2, ge=1, le=100, description="How many blocks, with what follows them.")

    def freeze(self, backbone: nn.Module) -> None:
        """Freeze all but these blocks."""
        from cibl_ray.networks.depth import train_last

        train_last(backbone, self.count)


class Norms(Settings):
    """Train the scales and shifts of the normalisation layers. Their running statistics stay as they are."""

    kind: Literal["norms"]

    def freeze(self, backbone: nn.Module) -> None:
        """Freeze all but the normalisation layers' parameters."""
        from cibl_ray.networks.depth import train_norms

        train_norms(backbone)


class Adapters(Settings):
    """Train low-rank adapters (LoRA) of linear layers and convolutions, by the library peft. Export merges them."""

    kind: Literal["adapters"]
    rank: int = Field(default=8, ge=1, le=1024, description="r: an adapter of n inputs and m outputs has r·(n + m) weights.")
    alpha: float = Field(default=16.0, gt=0, description="α: an adapter's output is multiplied by α/r.")

    def freeze(self, backbone: nn.Module) -> AdaptedBackbone:
        """Freeze the backbone and give it adapters, whose first weights are drawn from torch's generator."""
        from cibl_ray.networks.adapters import AdaptedBackbone

        backbone.requires_grad_(False)
        return AdaptedBackbone(backbone, self.rank, self.alpha)


PartialConfig = LastBlocks | Norms | Adapters


@dataclass(frozen=True)
class Needs:
    """What a loss asks of the network.

    Attributes:
        projection: Embeddings of unit norm beside the logits.
        prototypes: Unit vectors of the classes in the space of the embeddings, learned by themselves ("learned") or projected
            from the classifier's weights ("projected").
        detached_head: The classifier's gradient stops before the backbone.
    """

    projection: bool = False
    prototypes: Literal["learned", "projected"] | None = None
    detached_head: bool = False
