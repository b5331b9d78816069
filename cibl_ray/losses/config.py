"""The union of all losses, by `loss.kind`. Each method has a file with its configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cibl_ray.losses.balanced_softmax import BalancedSoftmaxConfig
from cibl_ray.losses.bcl import BCLConfig
from cibl_ray.losses.cibl import CIBLConfig
from cibl_ray.losses.cross_entropy import CrossEntropyConfig
from cibl_ray.losses.hybrid import HybridPSCConfig, HybridSCConfig
from cibl_ray.losses.label_smoothing import LabelSmoothingConfig
from cibl_ray.losses.ldam import LDAMConfig
from cibl_ray.losses.paco import PaCoConfig
from cibl_ray.losses.proco import ProCoConfig
from cibl_ray.losses.psc import PSCConfig
from cibl_ray.losses.supcon import SupConConfig
from cibl_ray.losses.vs import VSConfig

AnyLoss = (
    CrossEntropyConfig
    | BalancedSoftmaxConfig
    | LDAMConfig
    | VSConfig
    | LabelSmoothingConfig
    | SupConConfig
    | PSCConfig
    | HybridSCConfig
    | HybridPSCConfig
    | BCLConfig
    | PaCoConfig
    | ProCoConfig
    | CIBLConfig
)
LossConfig = Annotated[AnyLoss, Field(discriminator="kind")]
