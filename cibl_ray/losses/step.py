"""The loss that a configuration names. The trainer logs whatever terms it returns, and minimises the one named 'loss'."""

from __future__ import annotations

from typing import assert_never

import torch
import torch.nn.functional as F

from cibl_ray.config import CIBLConfig, CrossEntropyConfig
from cibl_ray.losses.cibl import cibl
from cibl_ray.networks.network import Outputs


def contrasts(config: CrossEntropyConfig | CIBLConfig) -> bool:
    """Whether the loss needs embeddings, and so the network a projection."""
    return isinstance(config, CIBLConfig)


def loss_terms(config: CrossEntropyConfig | CIBLConfig, outputs: Outputs, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scalars by name, 'loss' among them; labels int64 (M,), one for each view of each sample."""
    match config:
        case CrossEntropyConfig():
            return {"loss": F.cross_entropy(outputs.logits, labels, reduction="none").mean()}
        case CIBLConfig():
            assert outputs.embeddings is not None
            return cibl(outputs.logits, outputs.embeddings, labels, config.tail_skew, config.temperature)
    assert_never(config)
