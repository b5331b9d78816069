"""Rows of the table `search`: a short recipe for CIFAR-100-LT, and it with one thing changed, at equal cost but for length.

Every row is scored on a tenth of each class, set aside: what moves accuracy, for a given number of passes, is read here first.
"""

from __future__ import annotations

from benchmarks.reproduce.views import OTHER, PLAIN, STRONG, views

CONFIG = "cifar100_lt"
SHARE = 0.175  # of the budget's epochs: 35 of 200

RECIPE = ("--schedule", "{kind: cosine, warmup_epochs: 5}", "--evaluate_every", "10")
_BASE = (*RECIPE, *views(STRONG), "--network.head", "{kind: cosine}", "--loss", "{kind: balanced_softmax}")


def _cibl(skew: float, more: str = "") -> tuple[str, str]:
    return "--loss", f"{{kind: cibl, tail_skew: {skew}, kappa: 1{more}}}"


_QUEUE = ", queue: 1024"
_TWO = views(STRONG, OTHER)
_DECAY = ("--weight_decay", "1e-3")
_SCALE_30 = ("--network.head", "{kind: cosine, scale: {start: 30}}")
# Epochs, as a multiple of the base's, and options. Two views have half the epochs, so that the passes are as many.
_CHANGES: dict[str, tuple[float, tuple[str, ...]]] = {
    "base": (1, ()),
    # Length and schedule
    "twice the epochs": (2, ()),
    "three times the epochs": (3, ()),
    "steps at 80 % and 90 %": (1, ("--schedule", "{kind: steps, warmup_epochs: 5, milestones: [0.8, 0.9]}")),
    # Optimiser
    "weight decay 1e-3": (1, _DECAY),
    "weight decay 2e-3": (1, ("--weight_decay", "2e-3")),
    "weight decay 2e-4": (1, ("--weight_decay", "2e-4")),
    "learning rate 0.2": (1, ("--lr", "0.2")),
    "learning rate 0.05": (1, ("--lr", "0.05")),
    "batch of 64": (1, ("--batch_size", "64", "--lr", "0.05")),
    "averaged weights": (1, ("--train.average", "0.998")),
    "SAM in the last fifth, ρ = 0.1": (1, ("--optimizer.sam", "{rho: 0.1, from: 0.8}")),
    "SAM in the last fifth, ρ = 0.3": (1, ("--optimizer.sam", "{rho: 0.3, from: 0.8}")),
    # Head
    "linear head": (1, ("--network.head", "{kind: linear}")),
    "scale 30": (1, _SCALE_30),
    "scale 8 to 24": (1, ("--network.head", "{kind: cosine, scale: {start: 8, end: 24, shape: cosine}}")),
    "head's weights start at a norm of 1": (1, ("--network.head", "{kind: cosine, weight_norm: 1}")),
    # Images
    "crop and flip alone": (1, views(PLAIN)),
    "mixup, α = 0.2": (1, ("--train.mixup", "0.2")),
    "mixup, α = 1": (1, ("--train.mixup", "1")),
    "CMO": (1, ("--train.cmo", "{first_epochs: 3}")),
    # Loss on one view
    "cross-entropy": (1, ("--loss", "{kind: cross_entropy}")),
    "cross-entropy, label smoothing": (1, ("--loss", "{kind: label_smoothing}")),
    "VS, γ = 0.05": (1, ("--loss", "{kind: vs, logit_gamma: 0.05}")),
    "CIBL, λ = 0.002, queue": (1, _cibl(0.002, _QUEUE)),
    "CIBL, λ = 0.01, queue": (1, _cibl(0.01, _QUEUE)),
    "CIBL, λ = 0.05, queue": (1, _cibl(0.05, _QUEUE)),
    "CIBL, λ = 0.05, queue, by class": (1, _cibl(0.05, _QUEUE + ", normalize: class")),
    "CIBL, λ = 0.01, queue, expected counts": (1, _cibl(0.01, _QUEUE + ", count: expected")),
    "CIBL, λ = 0.002, queue, VS logits, γ = 0.05": (1, _cibl(0.002, _QUEUE + ", logit_gamma: 0.05")),
    # Loss on two views, at the same cost
    "CIBL, λ = 0.05, two views": (0.5, (*_TWO, *_cibl(0.05))),
    "CIBL, λ = 0.05, two views, CE on the first": (0.5, (*_TWO, *_cibl(0.05, ", classify: first"))),
    # 1.5 views on average, and keys that cost a third of a pass.
    "CIBL, λ = 0.05, queue, second view in the second half": (
        2 / 3,
        (*_TWO, *_cibl(0.05, _QUEUE), "--train.views_from", "0.5"),
    ),
    "CIBL, λ = 0.05, queue, averaged keys": (0.75, (*_TWO, *_cibl(0.05, _QUEUE + ", momentum: 0.99"))),
    "ProCo, two views": (0.5, (*_TWO, "--loss", "{kind: proco}")),
    "balanced softmax, two views": (0.5, _TWO),
    # What helped, together
    "weight decay 1e-3, scale 30": (1, (*_DECAY, *_SCALE_30)),
    "weight decay 2e-3, scale 30": (1, ("--weight_decay", "2e-3", *_SCALE_30)),
    "CIBL, λ = 0.002, queue, weight decay 1e-3, scale 30": (1, (*_cibl(0.002, _QUEUE), *_DECAY, *_SCALE_30)),
}


def rows(epochs: int) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Epochs and options of each row; `epochs` is the budget's."""
    return {value: (max(1, round(times * SHARE * epochs)), (*_BASE, *options)) for value, (times, options) in _CHANGES.items()}
