"""Rows of the tables `equal_cost` and `length`: each method on one short recipe, as many passes for all.

Published recipes differ in length, views and schedule, so their numbers say little about the losses. Here a method with more
views has fewer epochs. Optimiser, schedule, backbone and first view are the same. The head is cosine, scale 16, unless a row
names another.
"""

from __future__ import annotations

from benchmarks.reproduce.search import RECIPE
from benchmarks.reproduce.views import OTHER, STRONG, views
from pipelines.prepare.longtail import exp_counts

PASSES = 1_000_000  # of 200 epochs' budget, forward and backward: some 16 minutes of two cores with bf16
_CLASSES, _LARGEST = {"cifar10": 10, "cifar100": 100}, {"cifar10": 5000, "cifar100": 500}
_LINEAR, _SCALE_30 = "{kind: linear}", "{kind: cosine, scale: {start: 30}}"


def _cibl(skew: float, more: str = "") -> str:
    return f"{{kind: cibl, tail_skew: {skew}, kappa: 1{more}}}"


def _row(cost: float, loss: str, *others: str, head: str = "{kind: cosine}") -> tuple[float, tuple[str, ...]]:
    return cost, (*views(STRONG, *others), "--loss", loss, "--network.head", head)


# By data set. λ: CIFAR-10-LT's largest class has nine times the share of the images that CIFAR-100-LT's has, and so of |P|.
_SKEWS = {"cifar10": (0.0002, 0.001, 0.005, 0.02), "cifar100": (0.002, 0.01, 0.05, 0.2)}
_VS_GAMMA, _VS_DEFAULT = {"cifar10": 0.15, "cifar100": 0.05}, 0.15  # the published ones, and this project's
_PSC_TEMPERATURE = {"cifar10": 1.0, "cifar100": 0.1}


def _methods(dataset: str) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Method: passes for each image of an epoch, and its options.

    Keys of an averaged network are forward alone: a third of a pass.
    """
    skews, psc = _SKEWS[dataset], _PSC_TEMPERATURE[dataset]
    paco = "{kind: paco, temperature: 0.05, alpha: 0.01, queue: 1024, momentum: 0.999}"
    gammas = {f"VS, γ = {_VS_DEFAULT}": _VS_DEFAULT} | {"VS": _VS_GAMMA[dataset]}
    if gammas["VS"] == _VS_DEFAULT:
        del gammas[f"VS, γ = {_VS_DEFAULT}"]
    return {
        "CE": _row(1, "{kind: cross_entropy}", head=_LINEAR),
        "balanced softmax": _row(1, "{kind: balanced_softmax}"),
        **{name: _row(1, f"{{kind: vs, logit_gamma: {gamma}}}") for name, gamma in gammas.items()},
        "Hybrid-SC": _row(3, "{kind: hybrid_sc, temperature: 0.1}", OTHER, head=_LINEAR),
        "Hybrid-PSC": _row(3, f"{{kind: hybrid_psc, temperature: {psc}}}", OTHER, head=_LINEAR),
        "BCL": _row(3, "{kind: bcl, classify: first, contrast_views: others}", OTHER, OTHER, head=_SCALE_30),
        "ProCo": _row(3, "{kind: proco}", OTHER, OTHER, head=_LINEAR),
        "PaCo": _row(4 / 3, paco, OTHER, head=_LINEAR),
        f"CIBL, λ = {skews[2]}, two views": _row(2, _cibl(skews[2]), OTHER),
        f"CIBL, λ = {skews[1]}, linear head": _row(1, _cibl(skews[1], ", queue: 1024"), head=_LINEAR),
        **{f"CIBL, λ = {skew}": _row(1, _cibl(skew, ", queue: 1024")) for skew in skews},
    }


# Rows of `length`, times `PASSES`. How long does the cosine head need for what the linear one has after a million passes? Does
# a second view pay in a longer run?
_SHORTER, _LONGER = (0.5, 0.75), (2.5, 5)
_LENGTHS = {"CIBL, λ = 0.01": (*_SHORTER, *_LONGER), "balanced softmax": _LONGER, "CIBL, λ = 0.05, two views": _LONGER}
# What `search` found to help a short run on validation images. The longer a run, the less decay it should need.
_FOUND, _FOUND_OPTIONS = "weight decay 1e-3", ("--weight_decay", "1e-3")
_FOUND_LENGTHS = {"CIBL, λ = 0.002": (1, *_LONGER), "balanced softmax": (1, *_LONGER)}


def rows(dataset: str, factor: int, epochs: int) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Epochs and options of each row.

    Args:
        dataset: 'cifar10' or 'cifar100'.
        factor: Imbalance factor.
        epochs: The budget's; `PASSES` are for 200.
    """
    return {method: _of(method, dataset, factor, PASSES * epochs / 200) for method in _methods(dataset)}


def lengths(factor: int, epochs: int) -> dict[str, tuple[int, tuple[str, ...]]]:
    """The same of the table `length`: some methods on CIFAR-100-LT with fewer or more passes."""
    found = {}
    for lengths_of, name, options in ((_LENGTHS, "", ()), (_FOUND_LENGTHS, f", {_FOUND}", _FOUND_OPTIONS)):
        for method, several in lengths_of.items():
            for length in several:
                longer, own = _of(method, "cifar100", factor, length * PASSES * epochs / 200)
                found[f"{method}{name}, {length:g} M passes"] = longer, (*own, *options)
    return found


def _of(method: str, dataset: str, factor: int, passes: float) -> tuple[int, tuple[str, ...]]:
    cost, options = _methods(dataset)[method]
    images = int(exp_counts(_CLASSES[dataset], _LARGEST[dataset], factor).sum())
    return max(1, round(passes / (cost * images))), (*RECIPE, *options)
