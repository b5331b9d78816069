"""Recipes of fine-tuning and of second stages: the settings that `train.tune` brings along where it is changed.

They work on the content of a configuration, before it is validated.
"""

from __future__ import annotations

import logging
from typing import Any

from pydantic import BaseModel

from pipelines.common.settings import override

log = logging.getLogger(__name__)

Content = dict[str, Any]
Pairs = list[tuple[str, Any]]  # values by dotted name

# What is trained by in place of a head's recipe, whose learning rates would ruin a pretrained backbone.
_FINE_TUNING: Pairs = [
    ("optimizer", {"kind": "adamw", "lr": 1e-4, "weight_decay": 0.05, "layer_decay": 0.75}),
    ("schedule", {"kind": "cosine", "warmup_epochs": 0.5}),
    ("train.epochs", 3),
    ("train.batch_size", 16),
    ("train.folds", 0),
    ("train.head_start", "trained"),
    ("train.checkpoint_every", 1),
    ("train.checkpoint_minutes", 5),
]

# Of every second stage. The batch size and the images are those of the first.
_SECOND_STAGE: Pairs = [
    ("train.folds", 0),
    ("train.head_start", "auto"),
    ("train.views_from", 0.0),
    ("train.mixup", 0.0),
    ("train.cutmix", 0.0),
    ("train.cmo", None),
    ("train.average", None),
    ("train.epochs", 10),
    ("data.sampling", "class_balanced"),
    ("schedule", {"kind": "cosine", "warmup_epochs": 0}),
]
_MISLAS: Pairs = [  # Zhong et al. 2021: label-aware smoothing, a factor of each class's logit
    ("loss", {"kind": "label_smoothing"}),
    ("network.head.class_scale", 5.0),
    ("optimizer", {"kind": "sgd", "lr": 0.02, "nesterov": False, "weight_decay": 2e-4}),
]
_MAX_NORM: Pairs = [  # Alshammari et al. 2022: weight balancing
    ("loss", {"kind": "cross_entropy"}),
    ("optimizer", {"kind": "sgd", "lr": 0.01, "nesterov": False, "weight_decay": 0.1}),
]
_TAU: Pairs = [("loss", {"kind": "cross_entropy"}), ("train.epochs", 0)]  # Kang et al. 2020


def add_recipe(content: Content, pairs: Pairs, model: type[BaseModel]) -> Content:
    """Put the settings of a recipe into a configuration's content, where `pairs` ask for one, and say so in the log.

    Args:
        content: The content of a configuration file.
        pairs: Values by dotted name, which replace those of the content; they are not put in here.
        model: The configuration's class.
    """
    return _second_stage(_fine_tuning(content, pairs, model), pairs, model)


def _fine_tuning(content: Content, pairs: Pairs, model: type[BaseModel]) -> Content:
    """`content` with the recipe of fine-tuning, where it trains a head and `pairs` ask for more than that."""
    wanted = _value(override(content, pairs, model), "train", "tune") if _value(content, "train", "tune") == "head" else None
    if wanted not in ("partial", "full"):
        return content
    recipe = override(content, _FINE_TUNING, model)
    optimizer, train = recipe["optimizer"], recipe["train"]
    log.warning(
        "train.tune %s: the recipe of fine-tuning (adamw, lr %g, %d epochs, batches of %d, a trained head); what you set holds",
        wanted, optimizer["lr"], train["epochs"], train["batch_size"],
    )  # fmt: skip
    return recipe


def _second_stage(content: Content, pairs: Pairs, model: type[BaseModel]) -> Content:
    """`content` with the recipe of a second stage, where `pairs` ask for one."""
    asked, given = override(content, pairs, model), dict(pairs)
    if _value(asked, "train", "tune") != "classifier":
        return content
    if _value(content, "train", "tune") == "classifier":  # the file of a second stage has its settings already
        if not {"train.start", "train.tune"} <= given.keys():
            return content
        content = _without_cap(content, model)  # one that starts from it has a cap of its own
        asked = override(content, pairs, model)
    if given.get("train.head_start") == "tau_normalized":
        name, more = "τ-normalisation (nothing is trained)", _TAU
    elif _value(asked, "network", "head", "max_norm") is not None:
        name, more = "weight balancing (MaxNorm, lr 0.01, weight decay 0.1, 10 epochs)", _MAX_NORM
    else:
        name, more = "MiSLAS (label-aware smoothing, a factor of each class's logit, lr 0.02, 10 epochs)", _MISLAS
    views = _value(content, "data", "views")
    first: Pairs = [("data.views", views[:1] if isinstance(views, list) else [{}])]
    scale = _value(content, "network", "head", "scale", "end")
    if scale is not None:  # the head was trained up to it
        first.append(("network.head.scale", {"start": scale}))
    log.warning("train.tune classifier: the recipe of %s, images class-balanced; what you set holds", name)
    return override(content, [*_SECOND_STAGE, *more, *first], model)


def _without_cap(content: Content, model: type[BaseModel]) -> Content:
    """`content` without MaxNorm's cap. Only a linear head has the field."""
    head = _value(content, "network", "head")
    capped = isinstance(head, dict) and "max_norm" in head
    return override(content, [("network.head.max_norm", None)], model) if capped else content


def _value(content: Content, *path: str) -> Any:
    """The value at a path of keys; None where a key is missing, or what should hold it is not a dict."""
    value: Any = content
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
