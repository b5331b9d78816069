"""What stands on a backbone's features: the classification head, and the projection and prototypes for contrastive losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from cibl_ray.networks.heads.base import HeadSettings
from cibl_ray.networks.precision import at_least_float32


class Head(nn.Module):
    """Features (M, d_h) to logits (M, C) by the formula of a head's configuration, which holds no tensors itself.

    The scale s is set from outside as a schedule says, or learned. It is kept as its logarithm, so that it stays positive.

    Args:
        config: The head's configuration.
        features: d_h.
        classes: C.
    """

    def __init__(self, config: HeadSettings, features: int, classes: int) -> None:
        super().__init__()
        self.config = config
        # As torch.nn.Linear draws them.
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if config.initial_norm is not None:
            with torch.no_grad():
                self.weight.copy_(F.normalize(self.weight, dim=1) * config.initial_norm)
        self.bias: nn.Parameter | None = None
        if config.bias:
            bound = 1 / math.sqrt(features)
            self.bias = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))
        self.log_scale: torch.Tensor | None
        if config.initial_scale is None:
            self.log_scale = None
        elif config.learns_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(config.initial_scale)))
        else:
            self.register_buffer("log_scale", torch.tensor(math.log(config.initial_scale)))
        self.class_scale: nn.Parameter | None = None
        if config.class_scale_rate is not None:
            self.class_scale = nn.Parameter(torch.ones(classes))
        self.norm_cap: torch.Tensor | None
        self.register_buffer("norm_cap", None if config.norm_share is None else torch.zeros(()))
        self.set_cap()

    @property
    def scale(self) -> torch.Tensor | float:
        """The scale s; 1 for a head without one."""
        return 1.0 if self.log_scale is None else self.log_scale.exp()

    def set_scale(self, scale: float) -> None:
        """Set the scale of a head that has one."""
        assert self.log_scale is not None
        self.log_scale.fill_(math.log(scale))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Logits (M, C) of features (M, d_h)."""
        logits = self.config.logits(h, self.weight, self.bias, self.scale)
        return logits if self.class_scale is None else logits * self.class_scale

    @torch.no_grad()
    def set_cap(self) -> None:
        """Set the cap of the weights' norms by the weights as they are, where the head has one.

        Alshammari et al., "Long-Tailed Recognition via Weight Balancing", 2022: δ = min + share · (max - min) of the classes'
        norms, as in the authors' code.
        """
        share = self.config.norm_share
        if self.norm_cap is None or share is None:
            return
        norms = self.weight.norm(dim=1)
        self.norm_cap.copy_(norms.min() + share * (norms.max() - norms.min()))

    @torch.no_grad()
    def project(self) -> None:
        """Pull weights beyond the cap back onto it: w_c · min(1, δ / ‖w_c‖) (Alshammari et al. 2022, MaxNorm)."""
        if self.norm_cap is not None:
            norms = self.weight.norm(dim=1, keepdim=True)
            self.weight.mul_((self.norm_cap / norms.clamp(min=1e-12)).clamp(max=1))


class Neck(nn.Module):
    """Features (M, d) of the backbone to those that the head sees, (M, hidden): dropout, linear, ReLU."""

    def __init__(self, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, hidden), nn.ReLU(inplace=True))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Features (M, hidden) of features (M, d)."""
        result: torch.Tensor = self.layers(h)
        return result


class Projection(nn.Module):
    """z = MLP(h)/|MLP(h)|: features (M, d_h) to embeddings (M, d_z) of unit norm, in at least float32."""

    def __init__(self, features: int, hidden: int, size: int, norm: bool = False) -> None:
        super().__init__()
        self.size = size
        norms = [nn.BatchNorm1d(hidden)] if norm else []
        self.layers = nn.Sequential(nn.Linear(features, hidden), *norms, nn.ReLU(inplace=True), nn.Linear(hidden, size))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Embeddings (M, d_z) of features (M, d_h)."""
        return F.normalize(at_least_float32(self.layers(h)), dim=1)


class LearnedPrototypes(nn.Module):
    """One unit vector for each class in the space of the embeddings, (C, d_z), learned directly (Hybrid-PSC)."""

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(classes, size), dim=1))

    def forward(self, classifier: torch.Tensor) -> torch.Tensor:
        """Prototypes (C, d_z); the classifier's weights play no part."""
        return F.normalize(at_least_float32(self.weight), dim=1)


class ProjectedPrototypes(Projection):
    """One unit vector for each class, (C, d_z): an MLP of the classifier's weights (C, d_h) (balanced contrastive learning)."""
