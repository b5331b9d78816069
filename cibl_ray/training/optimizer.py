"""The optimizer of a run: its parameters, with their learning rates and weight decay."""

from __future__ import annotations

from typing import Any

import torch

from cibl_ray.config import OptimizerConfig
from cibl_ray.networks.depth import blocks, depth_of
from cibl_ray.networks.network import HybridNetwork


def make_optimizer(network: HybridNetwork, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    """Make the optimizer of a network's trainable parameters.

    Each parameter group has a `scale`: the schedule's learning rate is multiplied by it.

    Args:
        network: The network; parameters without gradient are left out.
        config: Kind, learning rate, decay.
        fused: Update all parameters in one kernel, on a GPU.

    Returns:
        SGD or AdamW.
    """
    parts = blocks(network.backbone)
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if config.layer_decay < 1 and name.startswith("backbone."):
            scale = config.layer_decay ** (len(parts) - depth_of(name.removeprefix("backbone."), parts))
        if name == "head.class_scale":
            scale = network.head.config.class_scale_rate or 1.0
        spared = config.kind == "adamw" and parameter.ndim < 2
        groups.setdefault((scale, network.decays(name) and not spared), []).append(parameter)
    content: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
    if config.kind == "adamw":
        return torch.optim.AdamW(content, lr=config.lr, betas=config.betas, fused=fused)
    return torch.optim.SGD(content, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
