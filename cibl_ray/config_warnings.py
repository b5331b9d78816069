"""Probable mistakes that a configuration allows."""

from __future__ import annotations

from cibl_ray.config import OptimizerConfig, RunConfig, StepSchedule, TrainConfig, one_view_epochs, warmup_of
from pipelines.common.words import plural
from pipelines.config import ExpProfile, Store


def config_warnings(config: RunConfig) -> list[str]:
    """Mistakes that a configuration allows, one line each, for the log. Refusing them would make finished runs unreadable."""
    asked, epochs = config.schedule.warmup_epochs, config.train.epochs
    found = config.loss.config_warnings(epochs, config.network.head)
    if (warmup := warmup_of(config.schedule, epochs)) < asked and epochs:
        found.append(
            f"schedule.warmup_epochs = {asked:g} is more than train.epochs = {epochs}: the rate rises over {warmup:g} epochs"
        )
    if isinstance(config.schedule, StepSchedule):
        found += _milestone_warnings(config.schedule.milestones, warmup, epochs)
    return found + _view_warnings(config) + _balance_warnings(config) + _vain_warnings(config)


def _view_warnings(config: RunConfig) -> list[str]:
    """Contrast with too few views."""
    needs, train, kind = config.loss.needs, config.train, config.loss.kind
    if not needs.contrast or needs.queue or needs.prototypes is not None:  # a class's prototype is a positive, too
        return []
    # A head's batch has as many views as data.views, each drawn from the features of feature_views.
    few = "data.views has one view" if len(config.data.views) < 2 else ""
    if not few and train.tune == "head" and not train.feature_views:
        few = "train.feature_views is 0, so that all views are the same"
    if not few:
        return []
    return [
        f"loss {kind!r} compares images of a class, and {few}: an image whose class comes once in a batch has no positive, so "
        "the tail learns no contrast; use two views"
    ]


def _balance_warnings(config: RunConfig) -> list[str]:
    """A prior in the loss for images whose classes are balanced already."""
    stream = config.loss.needs.second_stream
    sampling, field = (
        (stream.sampling, "loss.classifier_sampling") if stream is not None else (config.data.sampling, "data.sampling")
    )
    if sampling == "class_balanced" and config.loss.adds_prior:
        return [
            f"{field} {sampling!r} balances the classes, and so does the prior of loss {config.loss.kind!r}: the tail is "
            f"raised twice; set {field} to 'instance', or loss.kappa to 0"
        ]
    return []


def _vain_warnings(config: RunConfig) -> list[str]:
    """Options that do nothing, or harm, beside the others."""
    train, network, found = config.train, config.network, []
    if train.tune == "head" and config.loss.needs.projection and network.neck is None:
        found.append(
            f"train.tune 'head' with loss {config.loss.kind!r} and no neck: the contrast has no features to shape, and trains "
            "little but the projection; set network.neck: '{hidden: 512}'"
        )
    if train.cmo is not None and 0 < train.epochs <= train.cmo.first_epochs + train.cmo.last_epochs:
        found.append(
            f"train.cmo leaves the first {train.cmo.first_epochs} and the last {train.cmo.last_epochs} epochs plain, and there "
            f"are {train.epochs}: nothing is pasted; lower first_epochs and last_epochs"
        )
    if train.views_from > 0 and len(config.data.views) > 1 and one_view_epochs(train) >= train.epochs > 0:
        found.append(
            f"train.views_from {train.views_from:g} of {plural(train.epochs, 'epoch')} leaves every epoch with the first view "
            "alone; lower it, or train more epochs"
        )
    if (train.mixup or train.cutmix) and train.batch_size == train.accumulate:
        found.append("train.mixup and cutmix mix the images of a micro-batch, and it has one; lower train.accumulate")
    if config.data.store.mode != "mixed" and config.data.store.raw_share != Store().raw_share:
        found.append(
            f"data.store.raw_share {config.data.store.raw_share:g} is for mode 'mixed', and data.store.mode is "
            f"{config.data.store.mode!r}; set data.store.mode to 'mixed'"
        )
    if isinstance(config.data.profile, ExpProfile) and config.data.profile.subset == "field" and config.data.val_fraction:
        found.append(
            "data.profile.subset 'field': with data.val_fraction the validation images are taken out first, so the training "
            "images are not those of the published tables"
        )
    found += _idle_warnings(config)
    scratch = not network.backbone.pretrained and train.start is None
    if scratch and train.tune == "head":
        found.append(
            "train.tune 'head' keeps the backbone as it is, and with network.backbone.weights 'none' that is random; take "
            "pretrained weights: --network.backbone '{kind: resnet18, weights: default}', or set train.tune to 'full'"
        )
    if train.batch_norm == "keep" and scratch and train.tune != "head":
        found.append(
            "train.batch_norm 'keep' keeps the statistics of the pretrained weights, and there are none, so nothing is "
            "normalised; set auto"
        )
    return found


def _idle_warnings(config: RunConfig) -> list[str]:
    """Fields that are set and do nothing, for what another field is."""
    train, optimizer = config.train, config.optimizer
    head_only = train.tune == "head"
    idle = [
        (train.tau != "auto" and train.head_start != "tau_normalized", "train.tau", "train.head_start 'tau_normalized'"),
        (
            train.views_from > 0 and len(config.data.views) < 2,
            f"train.views_from {train.views_from:g}",
            "two data.views or more",
        ),
        (train.contrast_set == "step" and train.accumulate == 1, "train.contrast_set 'step'", "train.accumulate > 1"),
        (
            train.contrast_set == "step" and train.accumulate > 1 and not config.loss.needs.contrast,
            "train.contrast_set 'step'",
            "a loss with a contrast",
        ),
        (train.feature_views > 0 and not head_only, f"train.feature_views {train.feature_views}", "train.tune 'head'"),
        (train.partial != TrainConfig().partial and train.tune != "partial", "train.partial", "train.tune 'partial'"),
        (
            optimizer.momentum != OptimizerConfig().momentum and optimizer.kind != "sgd",
            f"optimizer.momentum {optimizer.momentum:g}",
            "optimizer.kind 'sgd'",
        ),
        (
            optimizer.betas != OptimizerConfig().betas and optimizer.kind != "adamw",
            f"optimizer.betas {list(optimizer.betas)}",
            "optimizer.kind 'adamw'",
        ),
        (
            optimizer.layer_decay != 1 and train.tune in ("head", "classifier"),
            f"optimizer.layer_decay {optimizer.layer_decay:g}",
            "train.tune 'partial' or 'full'",
        ),
        (train.batch_norm != "auto" and head_only, f"train.batch_norm {train.batch_norm!r}", "a train.tune other than 'head'"),
        (train.checkpoint_activations and head_only, "train.checkpoint_activations", "a train.tune other than 'head'"),
    ]
    found = [
        f"{field} is for {place} and does nothing here; leave it out, or set that" for is_idle, field, place in idle if is_idle
    ]
    first, *others = config.data.views
    if head_only and train.feature_views and any(view != first for view in others):
        found.append("train.tune 'head' draws every view as data.views[0] says; of the other entries only their number counts")
    if config.network.head.norm_share is not None and train.start is None and train.head_start in ("auto", "random"):
        found.append(
            "network.head.max_norm caps the classes' weights by their norms at the start, which are random here; it is for a "
            "second stage: name a finished run by train.start"
        )
    return found


def _milestone_warnings(milestones: tuple[float, ...], warmup: float, epochs: int) -> list[str]:
    found = []
    if list(milestones) != sorted(milestones):
        found.append(f"schedule.milestones = {list(milestones)} are out of order; they are taken as {sorted(milestones)}")
    early = [milestone for milestone in milestones if milestone * epochs < warmup]
    if early:
        found.append(
            f"schedule.milestones: {early[0]:g} of {epochs} epochs is within the warm-up of {warmup:g}: the rate never has "
            "its full value; lower schedule.warmup_epochs, or raise the milestone"
        )
    return found
