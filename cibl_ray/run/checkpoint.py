"""Checkpoints: one safetensors file each, with the weights, the optimizer's state and what rebuilds the network from it alone.

Nothing is ever unpickled. A file appears under its name only when it is whole, and the one before is kept until then.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from cibl_ray.config import RunConfig
from cibl_ray.networks.config import Adapters
from cibl_ray.networks.network import HybridNetwork, build_network
from cibl_ray.networks.state import below
from cibl_ray.run.folder import BEST, LAST, PREVIOUS
from cibl_ray.run.head import HEADER, read_head
from cibl_ray.run.log import is_row
from pipelines.common.errors import UserError
from pipelines.common.files import write_atomically
from pipelines.common.validation import validate

log = logging.getLogger(__name__)

FORMAT = 4
_READ = (2, 3, 4)  # 2: without steps within an epoch; 3: without an average of the weights
_MOMENTUM = "momentum_buffer"  # torch's name of SGD's momentum
# The tensors of a Checkpoint: the prefix of their names in the file, and the attribute.
_PARTS = {"weights": "weights", "momentum": "optimizer", "objective": "objective", "average": "average"}


@dataclass(frozen=True)
class Checkpoint:
    """State after `epoch` whole epochs and `step` steps of the next.

    A best checkpoint has the weights that were judged; its `optimizer`, `objective` and `average` are empty.

    Attributes:
        config: The configuration of the run.
        classes: The names of the classes.
        train_counts: Training images of each class, int64 (C,).
        data: The digest of each split's images.
        epoch: Whole epochs done.
        step: Steps done of the next epoch.
        workers: How many trained it; None: an older file does not say.
        best: The best validation accuracy so far and its epoch; None: no epoch was scored.
        weights: The network's state, tensors by name.
        optimizer: The optimizer's state, tensors by name (`optimizer_state`). In the file the names begin with `momentum.`.
        objective: What the loss carries from step to step (a queue, an averaged network), tensors by name.
        average: The average of the weights, by which the network is judged; empty where the run keeps none.
        rows: The log up to here, as `metrics.jsonl` has it; None in older files and in a best checkpoint.
        so_far: The sums of the epoch that was begun: its `terms` over the steps and workers, and its `seconds`. Empty between
            epochs and in older files.
        place: The file it was read from; None: it was not read from one.
    """

    config: RunConfig
    classes: list[str]
    train_counts: np.ndarray
    data: dict[str, str]
    epoch: int
    step: int
    workers: int | None
    best: dict[str, float] | None
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor] = field(default_factory=dict)
    objective: dict[str, torch.Tensor] = field(default_factory=dict)
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] | None = None
    so_far: dict[str, dict[str, float]] = field(default_factory=dict)
    place: Path | None = None

    def network(self) -> HybridNetwork:
        """The network that this checkpoint describes, with the weights to judge and to use it by. Adapters are merged."""
        config, train = self.config, self.config.train
        network = build_network(config.network, len(self.classes), config.loss.needs, seed=0, image_size=config.data.size)
        if train.tune == "partial" and isinstance(train.partial, Adapters):
            network.freeze(train.tune, train.partial)  # adapters have weights of their own
        load_weights(network, self, averaged=True)
        network.merge_adapters()
        return network


def load_weights(network: HybridNetwork, checkpoint: Checkpoint, averaged: bool = False) -> None:
    """Put a checkpoint's weights into `network`.

    Args:
        network: The network.
        checkpoint: The checkpoint.
        averaged: Take the average of the weights, where the checkpoint has one.

    Raises:
        UserError: The checkpoint is of another architecture.
    """
    weights = (averaged and checkpoint.average) or checkpoint.weights
    state = network.state_dict()
    strange = sorted(set(state) ^ set(weights))
    strange += [name for name in state if name not in strange and state[name].shape != weights[name].shape]
    if strange:
        made_by, classes = checkpoint.config.network, len(checkpoint.classes)
        raise UserError(
            f"the checkpoint is of another architecture: it was made by {made_by.backbone.title} with a "
            f"{made_by.head.kind} head, loss {checkpoint.config.loss.kind} and {classes} classes; "
            f"{len(strange)} tensors differ, the first is {strange[0]!r}"
        )
    network.load_state_dict(weights)


def optimizer_state(network: HybridNetwork, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by name.

    SGD's momentum has the name of its parameter. Other tensors have the parameter's name, a colon and their own name:
    `head.weight:exp_avg`, `head.weight:exp_avg_sq` and `head.weight:step` of AdamW.
    """
    state = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                state[name if key == _MOMENTUM else f"{name}:{key}"] = value
    return state


def load_optimizer(network: HybridNetwork, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Give an optimizer the state that `optimizer_state` returned.

    Args:
        network: The network whose parameters it optimises.
        optimizer: The optimizer.
        state: The tensors. Those of parameters that the network does not have are left out.
    """
    parameters = dict(network.named_parameters())
    for place, value in state.items():
        name, _, key = place.partition(":")
        parameter = parameters.get(name)
        if parameter is None:
            continue
        # Same memory layout as the parameter: a resumed step must add up in the same order.
        if value.shape == parameter.shape:
            like = torch.empty_like(parameter)
        else:  # AdamW's count of steps, which its fused kernel wants beside the weights
            like = torch.empty_like(value, device=parameter.device if optimizer.defaults.get("fused") else "cpu")
        optimizer.state[parameter][key or _MOMENTUM] = like.copy_(value)


def save_checkpoint(path: Path, checkpoint: Checkpoint, keep_previous: bool = False) -> None:
    """Write a checkpoint atomically.

    Args:
        path: The file. Its folder is made where it is missing.
        checkpoint: The checkpoint.
        keep_previous: Keep the whole file that had the name as `previous.safetensors`.
    """
    content = {
        "format": FORMAT,
        "config": checkpoint.config.model_dump(mode="json"),
        "classes": checkpoint.classes,
        "train_counts": checkpoint.train_counts.tolist(),
        "data": checkpoint.data,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "workers": checkpoint.workers,
        "best": checkpoint.best,
        "rows": checkpoint.rows,
        "so_far": checkpoint.so_far,
    }
    tensors = {
        f"{prefix}.{name}": tensor.detach().cpu().contiguous()
        for prefix, attribute in _PARTS.items()
        for name, tensor in getattr(checkpoint, attribute).items()
    }
    content["crc32"] = _crc32(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = to_bytes(tensors, {HEADER: json.dumps(content)})
    if not (keep_previous and read_head(path) is not None):  # a damaged one must not take the place of the good one before it
        write_atomically(path, whole)
        return
    second = path.with_name(PREVIOUS + ".part")
    second.unlink(missing_ok=True)
    try:
        second.hardlink_to(path)  # a second name, not a move: at no moment is there no file under the first one
    except OSError:  # a file system without hard links
        shutil.copyfile(path, second)
    try:
        write_atomically(path, whole)
    except OSError:
        second.unlink()
        raise
    second.replace(path.with_name(PREVIOUS))


def _crc32(tensors: dict[str, torch.Tensor]) -> int:
    """A checksum of the tensors, in order of their names: safetensors itself does not notice another bit in one."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: The file is missing, cut short, damaged or not one of ours.
    """
    if not os.path.lexists(path):
        raise UserError(f"no checkpoint at {str(path)!r}{_beside(path)}")
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} is not a file{_beside(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"checkpoint {str(path)!r} is cut short or damaged, or none at all: {reason}{_beside(path)}") from error
    try:
        content: dict[str, Any] = json.loads(header or "")
        if content["format"] not in _READ:
            raise UserError(f"checkpoint {str(path)!r} has format {content['format']}, this version reads {FORMAT}")
        if content.get("crc32") not in (None, _crc32(tensors)):
            raise UserError(f"checkpoint {str(path)!r} is damaged: its tensors are not those that were saved{_beside(path)}")
        rows = content.get("rows")
        return Checkpoint(
            config=validate(RunConfig, content["config"], str(path)),
            classes=_names(content["classes"]),
            train_counts=np.array(content["train_counts"], dtype=np.int64),
            data=dict(content["data"]),
            epoch=_count(content["epoch"]),
            step=_count(content.get("step", 0)),
            workers=content.get("workers"),
            best=content["best"],
            rows=None if rows is None else [row for row in rows if is_row(row)],
            so_far={group: _numbers(sums) for group, sums in content.get("so_far", {}).items()},
            place=path.absolute(),
            **{attribute: below(f"{prefix}.", tensors) for prefix, attribute in _PARTS.items()},
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is a safetensors file, but not a checkpoint of cibl-ray{_beside(path)}") from error


def _names(value: Any) -> list[str]:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise TypeError("classes")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError("a count")
    return value


def _numbers(value: dict[str, Any]) -> dict[str, float]:
    return {name: float(number) for name, number in value.items()}


def _beside(path: Path) -> str:
    """What to take instead of a damaged checkpoint: whole ones in the same folder."""
    whole = [name for name in (LAST, BEST, PREVIOUS) if name != path.name and read_head(path.with_name(name)) is not None]
    return f"; whole checkpoints beside it: {', '.join(whole)}" if whole else ""


@dataclass(frozen=True)
class Found:
    """The last whole checkpoint of a run, or None, and the damaged ones that were found before it."""

    checkpoint: Checkpoint | None
    damaged: list[Path]


def find_newest(folder: Path) -> Found:
    """Load the last whole checkpoint of a run's `checkpoints` folder: the one before where the last is damaged, and say so.

    Args:
        folder: The `checkpoints` folder; it need not exist.

    Raises:
        UserError: There are checkpoints, and all are damaged; or the folder is a link to nowhere, or a file may not be read.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{str(folder)!r} is a link to {str(folder.readlink())!r}, which is not there; bring it back, or remove the link"
        )
    damaged: list[Path] = []
    problems: list[UserError] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not os.path.lexists(path):
            continue
        if path.is_file() and not os.access(path, os.R_OK):
            raise UserError(f"checkpoint {str(path)!r} may not be read by this user; change its permissions")
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            damaged.append(path)
            problems.append(error)
            continue
        if problems:
            log.warning("%s; resuming from the one before, after epoch %d", problems[0], checkpoint.epoch)
        elif name == PREVIOUS:
            log.warning("%r is missing; resuming from the one before, after epoch %d", str(folder / LAST), checkpoint.epoch)
        return Found(checkpoint, damaged)
    if problems:
        raise UserError(f"{problems[0]}; to train again from epoch 1, move {' and '.join(map(repr, map(str, damaged)))} away")
    return Found(None, [])
