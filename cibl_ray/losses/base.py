"""What every loss's configuration has: its needs, its checks, and the terms that it computes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.networks.config import Needs
from cibl_ray.networks.heads.base import HeadSettings
from pipelines.common.settings import Settings
from pipelines.config import Sampling

if TYPE_CHECKING:
    import torch

# Far below what trains, .05 to 1; with 1e-10 the quotients leave float32.
Temperature = Annotated[float, Field(ge=1e-3, description="τ: divides the cosine of two embeddings.")]
Kappa = Annotated[float, Field(ge=0, description="κ: adds κ·log π to the logits. 0 is plain, 1 is balanced softmax.")]


@dataclass(frozen=True)
class SecondStream:
    """A second stream of images, from the same files as the first.

    Attributes:
        sampling: How often an epoch shows each class.
        views: Which of `data.views` it has.
    """

    sampling: Sampling
    views: tuple[int, ...]


@dataclass(frozen=True)
class LossNeeds(Needs):
    """What a loss needs of the network (see `Needs`) and of the run.

    Attributes:
        contrast: The embeddings of all workers, to compare the anchors with.
        queue: How many labelled embeddings of earlier batches are contrasted, too.
        momentum: Of an averaged network that embeds every view but the first; null: the network itself embeds all.
        second_stream: A second stream of images, whose logits the loss gets; null: one stream.
        class_means: The mean embedding of each class over the epoch.
    """

    contrast: bool = False
    queue: int = 0
    momentum: float | None = None
    second_stream: SecondStream | None = None
    class_means: bool = False


class LossSettings(Settings):
    """Base of every loss's configuration. Trainer, objective and validation ask it, and never which loss it is."""

    @property
    def needs(self) -> LossNeeds:
        """What the loss asks of the network and of the run."""
        return LossNeeds()

    def check(self, head: HeadSettings, views: int) -> None:
        """Refuse a head or views that the loss cannot work with.

        Args:
            head: The classification head.
            views: How many `data.views` there are.

        Raises:
            ValueError: One line that names the field, its value and the fix.
        """

    @property
    def adds_prior(self) -> bool:
        """Whether the loss adds κ·log π to the logits: the field `kappa`, where it has one, is not 0."""
        return bool(getattr(self, "kappa", 0.0))

    @property
    def advice_for_rare_classes(self) -> str:
        """What to change where classes stay at 0 %, as flags of the command line; empty where nothing is known to help."""
        return ""

    def config_warnings(self, epochs: int, head: HeadSettings) -> list[str]:
        """Warnings about allowed values that are probably a mistake, one line each.

        Args:
            epochs: Length of the run.
            head: The classification head.
        """
        return []

    @abstractmethod
    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """Compute the terms of one step.

        Args:
            inputs: The step's images as the network sees them.
            prior: The class frequencies of the training set.
            progress: t/T, the share of the epochs done, in [0, 1).

        Returns:
            Scalars by name, the "loss" to minimise among them. The others are logged.
        """


class ContrastMemory(LossSettings):
    """What is contrasted beyond the batch's own embeddings."""

    queue: int = Field(default=0, ge=0, le=2**20, description="Embeddings of earlier batches to contrast with.")
    momentum: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Decay of the averaged network that embeds every view but the first; null: the network embeds all.",
    )

    @property
    def needs(self) -> LossNeeds:
        """A projection, the contrast set, and the queue and the averaged network as configured."""
        return LossNeeds(projection=True, contrast=True, queue=self.queue, momentum=self.momentum)

    def check(self, head: HeadSettings, views: int) -> None:
        """Refuse an averaged network without a second view to embed."""
        if self.momentum is not None and views < 2:
            raise ValueError(
                "loss.momentum embeds every view but the first, and data.views has one; add a view, or set it to null"
            )


def weighted_sum(
    contrastive_weight: float, contrastive: torch.Tensor, cross_entropy_weight: float, cross_entropy: torch.Tensor
) -> Terms:
    """The terms of a loss that adds a contrastive scalar and a cross-entropy scalar."""
    loss = contrastive_weight * contrastive + cross_entropy_weight * cross_entropy
    return {"loss": loss, "cross_entropy": cross_entropy.detach(), "contrastive": contrastive.detach()}
