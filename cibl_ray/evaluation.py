"""Logits of a whole split, each sample once, in float32 whatever precision training had."""

from __future__ import annotations

import torch
from torch import nn

from cibl_ray.networks.network import HybridNetwork
from pipelines.batch import Loader


@torch.inference_mode()
def predict(
    network: HybridNetwork, loader: Loader, normalize: nn.Module, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits float32 (N, C), labels int64 (N,)), both on the CPU, in the file's order. Leaves the network in training mode
    or not as it was."""
    was_training = network.training
    network.eval()
    logits, labels = [], []
    for batch in loader.epoch(0):
        images = normalize(batch.views.to(device, non_blocking=True))
        logits.append(network.classify(images).cpu())
        labels.append(batch.labels.clone())
    network.train(was_training)
    if not logits:  # fewer images than workers
        return torch.empty(0, network.classes), torch.empty(0, dtype=torch.int64)
    return torch.cat(logits), torch.cat(labels)
