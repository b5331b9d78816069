"""What `loss:` in a configuration may say: one kind a method, and what each needs of the network and of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipelines.common.settings import Settings
from pipelines.config import Sampling

# Far below what trains, .05 to 1; with 1e-10 the quotients leave float32.
Temperature = Annotated[float, Field(ge=1e-3, description="τ: divides the cosine of two embeddings")]
Kappa = Annotated[float, Field(ge=0, description="κ: adds κ·log π to the logits; 0 is plain, 1 balanced softmax")]


class CrossEntropyConfig(Settings):
    """Plain cross-entropy on every view."""

    kind: Literal["cross_entropy"]


class BalancedSoftmaxConfig(Settings):
    """Cross-entropy on logits + κ·log π: balanced softmax (κ = 1), logit adjustment (other κ)."""

    kind: Literal["balanced_softmax"]
    kappa: Kappa = 1.0


class LDAMConfig(Settings):
    """Label-distribution-aware margins, with deferred re-weighting from `reweight_from` (a share of the epochs) on."""

    kind: Literal["ldam"]
    max_margin: float = Field(default=0.5, gt=0, description="of the rarest class, in cosine")
    reweight_from: float = Field(default=0.8, ge=0, le=1, description="share of the epochs; 1: never")
    beta: float = Field(default=0.9999, ge=0, lt=1, description="of the effective number of samples (1 - β^n)/(1 - β)")


class SupConConfig(Settings):
    """Supervised contrastive learning alone; the classifier learns beside it, on features that its gradient does not reach."""

    kind: Literal["supcon"]
    temperature: Temperature = 0.1


class PSCConfig(Settings):
    """Prototypical supervised contrastive learning alone; the classifier learns beside it, as with supcon."""

    kind: Literal["psc"]
    temperature: Temperature = 0.1
    positive_in_denominator: bool = False


class _Hybrid(Settings):
    temperature: Temperature = 0.1
    curve: Literal["parabolic", "linear", "cosine", "constant"] = Field(
        default="parabolic", description="of the contrastive share: 1-(t/T)², 1-t/T, half a cosine, or `share` throughout"
    )
    share: float = Field(default=0.5, ge=0, le=1, description="of the contrastive loss where the curve is constant")
    kappa: Kappa = 0.0
    classifier_sampling: Sampling = Field(default="class_balanced", description="of the batches that the classifier sees")
    classifier_views: tuple[int, ...] = Field(default=(0,), min_length=1, description="which of data.views the classifier sees")

    @model_validator(mode="after")
    def _share_is_heard(self) -> _Hybrid:
        # The default passes: a run's own configuration names every field.
        if self.curve != "constant" and self.share != type(self).model_fields["share"].default:
            raise ValueError(
                f"share {self.share:g} would do nothing: the curve is {self.curve}; set curve: constant, or leave it out"
            )
        return self


class HybridSCConfig(_Hybrid):
    """From supervised contrastive learning to class-balanced classification in the course of the run."""

    kind: Literal["hybrid_sc"]


class HybridPSCConfig(_Hybrid):
    """The same with learned prototypes: memory grows with the classes, not with the square of the batch."""

    kind: Literal["hybrid_psc"]
    positive_in_denominator: bool = False


class BCLConfig(Settings):
    """Balanced contrastive learning beside logit-adjusted cross-entropy."""

    kind: Literal["bcl"]
    temperature: Temperature = 0.1
    kappa: Kappa = 1.0
    cross_entropy_weight: float = Field(default=2.0, ge=0)
    contrastive_weight: float = Field(default=0.6, ge=0)
    classify: Literal["all", "first"] = Field(default="all", description="views that cross-entropy sees")


class _Memory(Settings):
    """What is contrasted beyond the batch's own embeddings."""

    queue: int = Field(default=0, ge=0, le=2**20, description="labelled embeddings of earlier batches to contrast with")
    momentum: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="of the averaged network that embeds every view but the first; None: the network itself embeds all",
    )


class PaCoConfig(_Memory):
    """Parametric contrastive learning: class centres (the classifier) and embeddings in one softmax."""

    kind: Literal["paco"]
    temperature: Temperature = 0.07
    kappa: Kappa = 1.0
    alpha: float = Field(default=0.05, gt=0, description="weight of each positive embedding")
    beta: float = Field(default=1.0, gt=0, description="weight of the class centre")
    queue: int = Field(default=1024, ge=0, le=2**20)
    momentum: float | None = Field(default=0.999, ge=0, lt=1)


def _by_name(value: object) -> object:
    """Earlier versions knew true and false."""
    return {True: "batch", False: "none"}[value] if isinstance(value, bool) else value


class CIBLConfig(_Memory):
    """Class instance balanced loss."""

    kind: Literal["cibl"] = "cibl"
    tail_skew: float = Field(default=0.05, ge=0, le=1e9, description="λ: 0 is cross-entropy; more moves accuracy to the tail")
    temperature: Temperature = 0.1
    kappa: Kappa = 0.0
    classify: Literal["all", "first"] = Field(
        default="all", description="views that cross-entropy sees; with momentum always the first"
    )
    normalize: Annotated[Literal["none", "batch", "class"], BeforeValidator(_by_name)] = Field(
        default="none",
        description="batch (or true): scale the cross-entropy weights 1-w to a mean of 1 over the batch; class: both terms are "
        "means within each class first, then over the classes of the batch",
    )


AnyLoss = (
    CrossEntropyConfig
    | BalancedSoftmaxConfig
    | LDAMConfig
    | SupConConfig
    | PSCConfig
    | HybridSCConfig
    | HybridPSCConfig
    | BCLConfig
    | PaCoConfig
    | CIBLConfig
)
LossConfig = Annotated[AnyLoss, Field(discriminator="kind")]


@dataclass(frozen=True)
class Needs:
    """What a loss asks of the network.

    prototypes: unit vectors of the classes in the space of the embeddings, learned by themselves or projected from the
    classifier's weights. detached_head: the classifier's gradient stops before the backbone.
    """

    projection: bool = True
    prototypes: Literal["learned", "projected"] | None = None
    detached_head: bool = False


def needs(config: AnyLoss) -> Needs:
    match config:
        case CrossEntropyConfig() | BalancedSoftmaxConfig() | LDAMConfig():
            return Needs(projection=False)
        case SupConConfig():
            return Needs(detached_head=True)
        case PSCConfig():
            return Needs(prototypes="learned", detached_head=True)
        case HybridPSCConfig():
            return Needs(prototypes="learned")
        case BCLConfig():
            return Needs(prototypes="projected")
        case HybridSCConfig() | PaCoConfig() | CIBLConfig():
            return Needs()
