"""What a trainer settles before its first step: batch and cache for these images and workers, and where a head starts."""

from __future__ import annotations

import logging

import torch
from torch import nn

from cibl_ray.config import RunConfig, TrainConfig
from cibl_ray.features.folds import FoldFeatures
from cibl_ray.features.loader import FeatureLoaders
from cibl_ray.features.start import start_head
from cibl_ray.networks.network import HybridNetwork
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders.make import decide_cache
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)


def settle(config: RunConfig, prepared: Prepared, world: World) -> RunConfig:
    """Fit a configuration to the images and the workers.

    Args:
        config: The run's configuration, resolved for this machine (`hardware.resolve`).
        prepared: The images.
        world: The workers.

    Returns:
        The configuration with the cache decided, and with a batch of all images where a head has fewer than a batch.

    Raises:
        UserError: The batch cannot be shared by the workers, or split into the parts of `train.accumulate`.
    """
    train = config.train
    samples = prepared.splits["train"].samples
    if train.tune == "head" and train.batch_size > samples:
        parts = train.accumulate * world.size if train.accumulate > 1 else 1
        lowered = max(parts, samples - samples % parts)
        log.info("train.batch_size is lowered from %d to %d of %d training images", train.batch_size, lowered, samples)
        train = train.model_copy(update={"batch_size": lowered})
    if train.batch_size < world.size:
        raise UserError(
            f"train.batch_size is {train.batch_size}, fewer than one image for each of {world.size} workers; raise it"
        )
    require_even_parts(train, world.size)
    return config.model_copy(update={"train": train, "loader": _decide_cache(config.loader, prepared, world, train.device)})


def require_even_parts(train: TrainConfig, workers: int, range_of_workers: str = "") -> None:
    """Raise UserError where so many workers cannot split a batch evenly into the parts of `train.accumulate`.

    Args:
        train: Batch size and parts.
        workers: How many share the batch.
        range_of_workers: What of the command may lead to so many, for the message.
    """
    if train.accumulate > 1 and train.batch_size % (train.accumulate * workers):
        among = f" among {workers} workers" if workers > 1 else ""
        because = f", which {range_of_workers} may have" if range_of_workers else ""
        raise UserError(
            f"train.batch_size {train.batch_size} cannot be split evenly into train.accumulate = {train.accumulate} "
            f"parts{among}{because}; change one of them"
        )


def checkpoint_activations(backbone: nn.Module, title: str) -> None:
    """Let a backbone compute activations again in the backward pass.

    Args:
        backbone: The backbone.
        title: Its name, for the message.

    Raises:
        UserError: It cannot.
    """
    switch = getattr(backbone, "set_grad_checkpointing", None)
    if switch is None:
        raise UserError(f"train.checkpoint_activations: network.backbone {title!r} cannot; timm's models can (kind: timm)")
    switch(True)


def start_heads(
    network: HybridNetwork, config: RunConfig, features: FeatureLoaders | FoldFeatures, world: World, device: torch.device
) -> None:
    """Give every worker the head that rank 0 makes of the training images' features.

    Args:
        network: Its head and neck change.
        config: Says how the head starts (`train.head_start`: class_means or trained), and the seed.
        features: Of the frozen backbone.
        world: The workers.
        device: Where the network is.
    """
    start = config.train.head_start
    assert start in ("class_means", "trained")
    labels = torch.from_numpy(features.labels("train")).to(device)
    of_train = features.features("train")[:, 0].to(device)

    def made() -> dict[str, torch.Tensor]:
        start_head(network, start, of_train, labels, config.seed)
        return {name: value.cpu() for name, value in network.state_dict().items() if name.startswith(("head.", "neck."))}

    network.load_state_dict(world.broadcast_from_rank0(made), strict=False)
    log.info("the head starts %s", "from class means" if start == "class_means" else "trained")


def _decide_cache(config: LoaderConfig, prepared: Prepared, world: World, device: str) -> LoaderConfig:
    """The cache for all workers: it decides the order of the images, so one whose memory is too small speaks for all."""
    cache = decide_cache(prepared, "train", config).cache
    small = float(world.sum(torch.tensor(float(cache == "process"), device=device)))
    return config.model_copy(update={"cache": "process" if small else "os"})
