"""What `network.backbone` in a configuration may say: a network's name, or `{kind: ..., weights: ...}`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cibl_ray.networks.backbones.base import WEIGHTS, BackboneSettings
from cibl_ray.networks.backbones.input_rule import InputRule, Origin

if TYPE_CHECKING:
    from torch import nn


class _CifarResNet(BackboneSettings):
    width: int = Field(
        default=16, ge=1, le=1024, description="Base channels. The field's tables have 16; another column of them has 64."
    )


class ResNet20Backbone(_CifarResNet):
    """ResNet-20 of 16 base channels, for images of 32 pixels (He et al. 2016, section 4.2)."""

    kind: Literal["resnet20"]

    def build(self) -> tuple[nn.Module, int]:
        """The network with random weights, and the number of its features."""
        from cibl_ray.networks.backbones.resnet_cifar import resnet20

        return resnet20(self.width)


class ResNet32Backbone(_CifarResNet):
    """ResNet-32 of 16 base channels, for images of 32 pixels (He et al. 2016, section 4.2)."""

    kind: Literal["resnet32"] = "resnet32"

    def build(self) -> tuple[nn.Module, int]:
        """The network with random weights, and the number of its features."""
        from cibl_ray.networks.backbones.resnet_cifar import resnet32

        return resnet32(self.width)


class _TorchvisionResNet(BackboneSettings):
    @property
    def min_size(self) -> int:
        """33: the network shrinks images 32-fold."""
        return 33

    def input_rule(self) -> InputRule | None:
        """How images were prepared when torchvision's weights were trained; None for random weights."""
        if not self.pretrained:
            return None
        # What torchvision's weights of this network were evaluated with.
        ratio = 224 / 232 if self.weights == "default" else 0.875
        return InputRule(224, ratio, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def origin(self) -> Origin | None:
        """Where the pretrained weights come from; None for random weights."""
        from cibl_ray.networks.backbones.resnet_imagenet import LICENCE, weights_name

        return Origin(self.title, weights_name(self.title), LICENCE) if self.weights == "default" else super().origin()

    def build(self) -> tuple[nn.Module, int]:
        """The network with random weights, and the number of its features."""
        from cibl_ray.networks.backbones.resnet_imagenet import build

        return build(self.title)

    def load(self, backbone: nn.Module) -> str | None:
        """Load the weights that `weights` names, and say where they came from."""
        from cibl_ray.networks.backbones.resnet_imagenet import load

        return load(backbone, self.title) if self.weights == "default" else super().load(backbone)


class ResNet18Backbone(_TorchvisionResNet):
    """torchvision's ResNet-18, for photographs."""

    kind: Literal["resnet18"]


class ResNet50Backbone(_TorchvisionResNet):
    """torchvision's ResNet-50, for photographs."""

    kind: Literal["resnet50"]


class ResNeXt50Backbone(_TorchvisionResNet):
    """torchvision's ResNeXt-50 32x4d, for photographs."""

    kind: Literal["resnext50"]


class TimmBackbone(BackboneSettings):
    """Any classification model of the library timm, by its name there."""

    kind: Literal["timm"]
    name: str = Field(default="tf_efficientnet_lite0", min_length=1, description="The model's name in timm.")
    weights: str = Field(
        default="default", min_length=1, description=f"{WEIGHTS} hf-hub:OWNER/NAME: a repository of the Hugging Face hub."
    )
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth in training, where the model has it.")

    @property
    def title(self) -> str:
        """The model's name in timm."""
        return self.name

    def input_rule(self) -> InputRule:
        """How images were prepared when timm's weights were trained."""
        from cibl_ray.networks.backbones.timm_model import input_rule

        return input_rule(self.name)

    def origin(self) -> Origin | None:
        """Where the pretrained weights come from, with the licence that timm names; None for random ones."""
        from cibl_ray.networks.backbones.timm_model import origin

        return origin(self.name, self.weights)

    def build(self) -> tuple[nn.Module, int]:
        """The network with random weights, and the number of its features."""
        from cibl_ray.networks.backbones.timm_model import build

        return build(self.name, self.drop_path)

    def load(self, backbone: nn.Module) -> str | None:
        """Load the weights that `weights` names, and say where they came from."""
        from cibl_ray.networks.backbones.timm_model import load

        return load(backbone, self.name, self.weights)


class ModuleBackbone(BackboneSettings):
    """Your own network: a function without arguments that returns a torch module, images to features (M, d_h)."""

    kind: Literal["module"]
    path: str = Field(
        pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$",
        description="my_package.my_function, as Python finds it, or in the folder that the command runs in.",
    )
    weights: str = Field(
        default="none", description="none: as the function returns it; FILE: safetensors, or a state dict of torch."
    )

    @property
    def title(self) -> str:
        """The path of the function."""
        return self.path

    def build(self) -> tuple[nn.Module, int]:
        """The network as the function returns it, and the number of its features."""
        return self.build_for(None)

    def build_for(self, image_size: int | None) -> tuple[nn.Module, int]:
        """The network as the function returns it, and the number of its features, found by images of this size."""
        from cibl_ray.networks.backbones.module import build

        return build(self.path, image_size)

    def code(self, backbone: nn.Module) -> str:
        """A digest of the files that define the function and the network's layers."""
        from cibl_ray.networks.backbones.module import code

        return code(self.path, backbone)


def _by_name(value: Any) -> Any:
    """`backbone: resnet32` is `backbone: {kind: resnet32}`."""
    return {"kind": value} if isinstance(value, str) else value


BackboneConfig = (
    ResNet20Backbone
    | ResNet32Backbone
    | ResNet18Backbone
    | ResNet50Backbone
    | ResNeXt50Backbone
    | TimmBackbone
    | ModuleBackbone
)
AnyBackbone = Annotated[Annotated[BackboneConfig, Field(discriminator="kind")], BeforeValidator(_by_name)]


def weights_file(backbone: BackboneConfig) -> Path | None:
    """The file of the weights, as an absolute path; None where they do not come from a file."""
    if backbone.weights in ("none", "default") or backbone.weights.startswith("hf-hub:"):
        return None
    return Path(backbone.weights).expanduser().absolute()


def dump(backbone: BackboneConfig) -> Any:
    """The backbone as YAML or JSON writes it: its name alone, where all else has its default."""
    content = backbone.model_dump(mode="json")
    if content.get("width") == 16:  # as configurations without that field have it
        del content["width"]
    return content["kind"] if content == {"kind": content["kind"], "weights": "none"} else content
