"""What every classification head has: its configuration, and how logits follow from features."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pipelines.common.settings import Settings

if TYPE_CHECKING:
    import torch


ClassScale = Annotated[
    float | None,
    Field(
        gt=0,
        le=1000,
        description="Train a factor of each class's logit, which starts at 1, with this many times `optimizer.lr` (learnable "
        "weight scaling); null: none.",
    ),
]


class HeadSettings(Settings):
    """Base of every head's configuration. A head has weights (C, d_h), and a bias and a scale where it says so.

    Attributes:
        bias: Whether the head has a bias (C,).
        cosine: Whether its logits are cosines times a scale. Losses with margins between cosines need that.
    """

    bias: ClassVar[bool] = False
    cosine: ClassVar[bool] = False

    @abstractmethod
    def logits(
        self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | float
    ) -> torch.Tensor:
        """Compute the logits.

        Args:
            h: Features, (M, d_h).
            weight: The classes' weights, (C, d_h).
            bias: (C,), or None where the head has none.
            scale: The head's scale s; 1 where it has none.

        Returns:
            Logits, (M, C).
        """

    @property
    def initial_scale(self) -> float | None:
        """The scale s at the start of a run; None for a head without one."""
        return None

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is a parameter, learned with the weights."""
        return False

    @property
    def initial_norm(self) -> float | None:
        """The norm of each class's weights at the start of a run; None: as `torch.nn.Linear` draws them, .58 on average."""
        return None

    @property
    def class_scale_rate(self) -> float | None:
        """The learning rate of a factor of each class's logit, as a multiple of the weights'; None: there is no factor."""
        return None

    @property
    def norm_share(self) -> float | None:
        """Where between the least and the largest norm of the classes' first weights their cap lies, 0 to 1; None: no cap."""
        return None

    def scale_at(self, epoch: float, epochs: int) -> float | None:
        """The scheduled scale at `epoch` (fractional) of `epochs`; None where no schedule sets it."""
        return None

    def check(self, epochs: int) -> None:
        """Refuse what does not fit a run of `epochs` epochs.

        Raises:
            ValueError: One line that names the field, its value and the fix.
        """
