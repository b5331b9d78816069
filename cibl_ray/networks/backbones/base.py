"""What every backbone's configuration offers. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cibl_ray.networks.backbones.input_rule import InputRule, Origin
from pipelines.common.errors import UserError
from pipelines.common.settings import Settings

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "none: random; default: the weights that are known for it; FILE: safetensors, or a state dict of torch."


class BackboneSettings(Settings):
    """Base of every backbone's configuration. Methods that need torch import it themselves."""

    weights: str = Field(default="none", description=WEIGHTS)

    @property
    def title(self) -> str:
        """The network's name, for logs."""
        kind: str = self.kind  # type: ignore[attr-defined]
        return kind

    @property
    def pretrained(self) -> bool:
        """Whether the configuration names pretrained weights."""
        return self.weights != "none"

    @property
    def min_size(self) -> int:
        """The smallest side of an image that the network takes, pixels."""
        return 1

    def input_rule(self) -> InputRule | None:
        """How images were prepared when the weights were trained; None for random weights, or where it is not known."""
        return None

    def origin(self) -> Origin | None:
        """Where the pretrained weights come from, for the model card; None for random weights."""
        return Origin(self.title, Path(self.weights).name, None) if self.pretrained else None

    @abstractmethod
    def build(self) -> tuple[nn.Module, int]:
        """Build the network with random weights.

        Returns:
            The network, images (M, 3, S, S) to features (M, d_h), and d_h.
        """

    def build_for(self, image_size: int | None) -> tuple[nn.Module, int]:
        """Build the network for images of a size, as `build` does where it takes any.

        Args:
            image_size: Pixels of a side; None: not known.

        Returns:
            The network and d_h, as of `build`.
        """
        return self.build()

    def code(self, backbone: nn.Module) -> str | None:
        """A digest of what the features follow from beside the weights: code of the user's own; None for a known network.

        Args:
            backbone: What `build` returned.
        """
        return None

    def load(self, backbone: nn.Module) -> str | None:
        """Load the pretrained weights into what `build` returned.

        Args:
            backbone: The network.

        Returns:
            Where they came from; None where the weights stay random.

        Raises:
            UserError: The weights cannot be read or fetched, or are of another network.
        """
        from cibl_ray.networks.backbones.weights import load_file

        if not self.pretrained:
            return None
        if self.weights == "default":
            raise UserError(f"network.backbone {self.title!r} has no pretrained weights; set its weights to none, or to a file")
        return load_file(backbone, self.weights)
