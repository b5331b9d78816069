"""A run that starts from another run's weights: second stages, and training on."""

from __future__ import annotations

import logging
from pathlib import Path

from cibl_ray.networks.network import HybridNetwork
from cibl_ray.run.checkpoint import Checkpoint, load_checkpoint
from cibl_ray.run.which import checkpoint
from pipelines.common.errors import UserError
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)

# What the other network may lack: it serves training alone, or starts as it is built.
_TRAINING_ALONE = ("projection.", "prototypes.", "head.norm_cap")
_OPTIONAL = (*_TRAINING_ALONE, "head.log_scale", "head.class_scale")


def read_start(path: Path) -> Checkpoint:
    """Read the checkpoint that `train.start` names.

    Args:
        path: A run folder (its best checkpoint is taken, else its last), or a checkpoint file.

    Raises:
        UserError: There is no such checkpoint, or it cannot be read.
    """
    try:
        return load_checkpoint(checkpoint(path))
    except UserError as error:
        raise UserError(f"train.start: {error}") from error


def start_from(network: HybridNetwork, start: Checkpoint, place: Path, prepared: Prepared, keep_head: bool) -> None:
    """Give a network the weights of a checkpoint: of backbone and neck, and of what else both have.

    Args:
        network: Gets the weights by which the checkpoint's network is judged; adapters are merged.
        start: The checkpoint.
        place: Its run, for messages.
        prepared: The images of the new run.
        keep_head: Whether the classifier's weights are taken, too.

    Raises:
        UserError: The checkpoint is of another network, or its classifier is of other classes.
    """
    if keep_head and start.classes != prepared.classes:
        raise UserError(
            f"train.start {str(place)!r} tells {len(start.classes)} classes apart that are not the {len(prepared.classes)} of "
            "these data; for a new classifier: --train.head_start random"
        )
    given, own = start.network().state_dict(), network.state_dict()
    if not keep_head:
        given = {name: value for name, value in given.items() if not name.startswith("head.")}
    needed = [name for name in own if not name.startswith(_OPTIONAL) and (keep_head or not name.startswith("head."))]
    strange = [name for name in needed if name not in given]
    strange += [name for name in given if name not in own and not name.startswith(_TRAINING_ALONE)]
    strange += [name for name in needed if name in given and given[name].shape != own[name].shape]
    if strange:
        made_by = start.config.network
        raise UserError(
            f"train.start {str(place)!r} is of another network, {made_by.backbone.title} with a {made_by.head.kind} head: "
            f"{len(strange)} tensors differ, the first is {strange[0]!r}; begin with the configuration of that run, "
            "config.yaml in its folder"
        )
    network.load_state_dict(
        {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}, strict=False
    )
    network.head.set_cap()
    changed = [name for name, digest in start.data.items() if name in prepared.splits and not prepared.splits[name].has(digest)]
    if changed:
        log.warning(
            "the %s images are not those of %s: what is held out here may have been trained on there",
            " and ".join(changed), place,
        )  # fmt: skip
    log.info("the weights start as those of %s after epoch %d%s", place, start.epoch, "" if keep_head else ", with a new head")
