"""A head that starts from the features of the pretrained backbone, instead of random weights."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from cibl_ray.networks.network import HybridNetwork
from pipelines.common.seeding import torch_seed

_EPOCHS, _BATCH, _RATE, _DECAY = 30, 128, 0.1, 1e-4  # of the head that is trained: as the configuration `photos` does


def start_head(
    network: HybridNetwork,
    start: Literal["class_means", "trained"],
    features: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
) -> None:
    """Set the weights of a network's head from its backbone's features.

    Args:
        network: Its head and neck change, nothing else.
        start: "class_means": a linear head is a Gaussian of equal, isotropic variance at the mean of each class, a cosine
            head points to the mean. "trained": head and neck are trained on the features by balanced softmax first, so that
            fine-tuning does not distort the features for a random head (Kumar et al. 2022, arXiv:2202.10054).
        features: float32 (N, d).
        labels: int64 (N,); every class occurs.
        seed: Of the order of the batches.
    """
    if start == "class_means":
        _class_means(network, features, labels)
    else:
        _train(network, features, labels, seed)


@torch.no_grad()
def _class_means(network: HybridNetwork, features: torch.Tensor, labels: torch.Tensor) -> None:
    was_training = network.training
    h = network.eval().features(features)
    network.train(was_training)
    head, counts = network.head, torch.bincount(labels, minlength=network.classes)
    means = h.new_zeros(network.classes, h.shape[1]).index_add_(0, labels, h) / counts[:, None]
    if head.bias is None:
        head.weight.copy_(means)
        return
    # log N(h; μ_c, σ²I) = (μ_c·h - |μ_c|²/2) / σ² and what does not depend on c. Dimensions are not independent, so σ² is
    # chosen by the likelihood of the labels among powers of two.
    logits = h @ means.T - means.square().sum(1) / 2
    spread = float((h - means[labels]).square().sum(1).mean()) or 1.0
    scales = [2.0**power / spread for power in range(-4, 12)]
    scale = min(scales, key=lambda each: float(F.cross_entropy(each * logits, labels)))
    head.weight.copy_(scale * means)
    head.bias.copy_(-scale * means.square().sum(1) / 2)


def _train(network: HybridNetwork, features: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
    parts = [network.head] if network.neck is None else [network.neck, network.head]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.SGD(parameters, _RATE, momentum=0.9, nesterov=True, weight_decay=_DECAY)
    log_prior = (torch.bincount(labels, minlength=network.classes) / len(labels)).log()
    batch = min(_BATCH, len(labels))
    steps = _EPOCHS * max(len(labels) // batch, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "head start"))
        for number in range(steps):
            if number % max(len(labels) // batch, 1) == 0:
                order = torch.randperm(len(labels))
            first = number % max(len(labels) // batch, 1) * batch
            rows = order[first : first + batch].to(labels.device)
            loss = F.cross_entropy(network.classify(features[rows]) + log_prior, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)
