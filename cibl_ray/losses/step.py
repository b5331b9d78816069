"""The loss that a configuration names, on what the network made of one step's images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch

from cibl_ray.losses import config as kinds
from cibl_ray.losses.cibl import cibl
from cibl_ray.losses.classification import adjusted, cross_entropy, effective_number_weights, ldam, ldam_margins
from cibl_ray.losses.contrastive import Contrast, balanced_contrastive, paco, psc, supcon
from cibl_ray.losses.hybrid import contrastive_share

Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """One step's images as the network sees them.

    logits (M, C) and labels int64 (M,) of the images, the V views of a sample next to each other; all_labels: the same over all
    workers. embeddings z (M, d) where the loss needs a projection; the contrast set they belong to where it compares them with
    each other, prototypes (C, d) where it compares with those. scale: s of a cosine head, else 1. classified: logits and labels
    of the second stream of images, where the loss has one.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    all_labels: torch.Tensor
    views: int
    embeddings: torch.Tensor | None
    contrast: Contrast | None
    prototypes: torch.Tensor | None
    scale: torch.Tensor | float
    classified: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True)
class Tail:
    """What the losses know of the training set: images of each class (C,), and log π (C,) in the logits' type."""

    train_counts: torch.Tensor
    log_prior: torch.Tensor


def loss_terms(config: kinds.AnyLoss, seen: Seen, tail: Tail, progress: float) -> Terms:
    """Scalars by name, the 'loss' to minimise among them. progress: t/T, the share of the epochs done."""
    logits, labels = seen.logits, seen.labels
    match config:
        case kinds.CrossEntropyConfig():
            return {"loss": cross_entropy(logits, labels).mean()}
        case kinds.BalancedSoftmaxConfig():
            return {"loss": cross_entropy(adjusted(logits, tail.log_prior, config.kappa), labels).mean()}
        case kinds.LDAMConfig():
            return _ldam(config, seen, tail, progress)
        case kinds.CIBLConfig():
            z, contrast = _embedded(seen)
            every = seen.views if config.classify == "first" else 1
            tilted = adjusted(logits, tail.log_prior, config.kappa)
            return cibl(
                tilted, z, labels, contrast, config.tail_skew, config.temperature, every, config.normalize, seen.all_labels
            )
        case kinds.PaCoConfig():
            z, contrast = _embedded(seen)
            tilted = adjusted(logits, tail.log_prior, config.kappa)
            return paco(tilted, z, labels, contrast, config.temperature, config.alpha, config.beta, seen.all_labels)
        case kinds.BCLConfig():
            z, contrast = _embedded(seen)
            assert seen.prototypes is not None
            contrastive = balanced_contrastive(z, labels, contrast, seen.prototypes, config.temperature).mean()
            if config.classify == "first":
                logits, labels = logits[:: seen.views], labels[:: seen.views]
            classified = cross_entropy(adjusted(logits, tail.log_prior, config.kappa), labels).mean()
            return _weighted(config.contrastive_weight, contrastive, config.cross_entropy_weight, classified)
        case kinds.SupConConfig() | kinds.PSCConfig():
            # The classifier's features are detached: the two terms teach different parameters.
            return _weighted(1.0, _contrastive(config, seen), 1.0, cross_entropy(logits, labels).mean())
        case kinds.HybridSCConfig() | kinds.HybridPSCConfig():
            assert seen.classified is not None
            logits, labels = seen.classified
            share = contrastive_share(config.curve, progress, config.share)
            classified = cross_entropy(adjusted(logits, tail.log_prior, config.kappa), labels).mean()
            terms = _weighted(share, _contrastive(config, seen), 1 - share, classified)
            return terms | {"contrastive_share": torch.tensor(share)}
    assert_never(config)


def _contrastive(
    config: kinds.SupConConfig | kinds.PSCConfig | kinds.HybridSCConfig | kinds.HybridPSCConfig, seen: Seen
) -> torch.Tensor:
    match config:
        case kinds.SupConConfig() | kinds.HybridSCConfig():
            z, contrast = _embedded(seen)
            return supcon(z, seen.labels, contrast, seen.logits.shape[1], config.temperature).mean()
        case kinds.PSCConfig() | kinds.HybridPSCConfig():
            assert seen.embeddings is not None
            assert seen.prototypes is not None
            return psc(seen.embeddings, seen.labels, seen.prototypes, config.temperature, config.positive_in_denominator).mean()
    assert_never(config)


def _weighted(contrastive_weight: float, contrastive: torch.Tensor, rest: float, classified: torch.Tensor) -> Terms:
    loss = contrastive_weight * contrastive + rest * classified
    return {"loss": loss, "cross_entropy": classified.detach(), "contrastive": contrastive.detach()}


def _ldam(config: kinds.LDAMConfig, seen: Seen, tail: Tail, progress: float) -> Terms:
    losses = ldam(seen.logits, seen.labels, ldam_margins(tail.train_counts, config.max_margin), seen.scale)
    if progress < config.reweight_from:
        return {"loss": losses.mean()}
    weights = effective_number_weights(tail.train_counts, config.beta).to(losses.dtype)
    return {"loss": (weights[seen.labels] * losses).mean() / weights[seen.all_labels].mean()}


def _embedded(seen: Seen) -> tuple[torch.Tensor, Contrast]:
    assert seen.embeddings is not None
    assert seen.contrast is not None
    return seen.embeddings, seen.contrast
