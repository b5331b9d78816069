"""What `network:` in a configuration may say, and what a network can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cibl_ray.networks.heads.cosine import CosineHeadConfig
from cibl_ray.networks.heads.linear import LinearHeadConfig
from pipelines.common.settings import Settings


@dataclass(frozen=True)
class Backbone:
    """Where a backbone comes from.

    Attributes:
        builder: "module:function", the module below `cibl_ray.networks.backbones`. The function takes nothing. It returns the
            network, images (M, 3, S, S) to features (M, d_h), and d_h.
        min_size: The smallest images that it takes, pixels a side.
    """

    builder: str
    min_size: int = 1


BACKBONES = {
    "resnet20": Backbone("resnet_cifar:resnet20"),
    "resnet32": Backbone("resnet_cifar:resnet32"),
    "resnet50": Backbone("resnet_imagenet:resnet50", min_size=33),
    "resnext50": Backbone("resnet_imagenet:resnext50", min_size=33),
}
if TYPE_CHECKING:
    BackboneName = str
else:
    BackboneName = Literal[tuple(BACKBONES)]

HeadConfig = Annotated[
    LinearHeadConfig
    | CosineHeadConfig,
    Field(discriminator="kind"),
]  # fmt: skip


class ProjectionConfig(Settings):
    """The MLP before the contrastive loss: d_h -> hidden -> size, of unit norm."""

    hidden: int = Field(default=512, ge=1, description="Width of the hidden layer.")
    size: int = Field(default=128, ge=1, description="Dimensions of the embedding.")


class NetworkConfig(Settings):
    """Backbone, classification head, and the projection for losses that contrast embeddings."""

    backbone: BackboneName = Field(default="resnet32", description="The network before the head.")
    head: HeadConfig = LinearHeadConfig()
    projection: ProjectionConfig = ProjectionConfig()

    def check(self, image_size: int, epochs: int) -> None:
        """Refuse what does not fit the images or the length of the run.

        Raises:
            ValueError: One line that names the field, its value and the fix.
        """
        smallest = BACKBONES[self.backbone].min_size
        if image_size < smallest:
            small = " or ".join(name for name, backbone in BACKBONES.items() if backbone.min_size <= image_size)
            raise ValueError(
                f"network.backbone {self.backbone!r} takes images of {smallest} pixels and more, data.size is {image_size}; "
                f"use {small} for small images"
            )
        self.head.check(epochs)


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
