"""Pretrained weights from a file into a network: nothing is unpickled, and no tensor is left out silently."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as read_safetensors
from torch import nn

from pipelines.common.errors import UserError

log = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema")  # what training scripts keep the weights under
# In a checkpoint of this project. The average comes first, where the run kept one: it is the network that was evaluated.
_OURS = ("average.backbone.", "weights.backbone.")
_OPTIONAL = "num_batches_tracked"  # batch normalisation's counter, which older files lack and which nothing here reads

Tensors = dict[str, torch.Tensor]


def load_file(network: nn.Module, file: str, classifier: tuple[str, ...] = ("fc", "classifier", "head")) -> str:
    """Load a file's weights into `network`.

    Args:
        network: Gets the weights. It has no classifier of its own.
        file: Safetensors, a state dict that torch wrote, or a checkpoint of this project.
        classifier: Names of modules whose weights the file may have and the network lacks.

    Returns:
        The file's name, for the log.

    Raises:
        UserError: The file cannot be read, or is of another network.
    """
    put(network, read_file(Path(file).expanduser()), file, classifier)
    return file


def read_file(path: Path) -> Tensors:
    """Read a file of weights: safetensors, a state dict of torch, or a checkpoint of this project.

    Returns:
        The tensors by name, without the prefixes that training scripts add.

    Raises:
        UserError: The file does not exist, cannot be read, or holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"network.backbone.weights {str(path)!r} does not exist; give a file, or 'default', or 'none'")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        # Not what torch says: it advises to load the file unsafely.
        reason = f" ({str(error)[:200]})" if isinstance(error, SafetensorError | OSError) else ""
        raise UserError(
            f"network.backbone.weights {str(path)!r} cannot be read as safetensors or as a state dict of torch{reason}; "
            "files that would run code are refused: save the state dict alone, best as safetensors"
        ) from error
    while isinstance(content, Mapping) and (inner := next((key for key in _WRAPPERS if key in content), None)) is not None:
        content = content[inner]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        raise UserError(f"network.backbone.weights {str(path)!r} holds no state dict: names and tensors are expected")
    tensors = {str(name).removeprefix("module."): value for name, value in content.items()}
    for prefix in _OURS:
        if own := {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}:
            return own
    return tensors


def put(network: nn.Module, tensors: Tensors, source: str, classifier: tuple[str, ...]) -> None:
    """Load `tensors` into `network`: all of them, except a classifier's.

    Args:
        network: Gets the weights.
        tensors: By the names that the network has for them.
        source: Where they came from, for messages.
        classifier: Names of modules whose weights may be left out.

    Raises:
        UserError: A tensor is missing, left over, or of another shape. The message lists them.
    """
    state = network.state_dict()
    given = {
        name: value
        for name, value in tensors.items()
        if name in state or not (name.endswith(_OPTIONAL) or name.startswith(tuple(f"{part}." for part in classifier)))
    }
    missing = [name for name in state if name not in given and not name.endswith(_OPTIONAL)]
    left_over = [name for name in given if name not in state]
    shapes = [
        f"{name} {tuple(given[name].shape)} for {tuple(state[name].shape)}"
        for name in state
        if name in given and given[name].shape != state[name].shape
    ]
    problems = [("missing", missing), ("left over", left_over), ("of another shape", shapes)]
    if any(names for _, names in problems):
        listed = "; ".join(f"{len(names)} {how}: {_some(names)}" for how, names in problems if names)
        raise UserError(f"the weights {source} are of another network: {listed}; name the network that they are of")
    network.load_state_dict({name: value for name, value in given.items() if name in state}, strict=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def cannot_fetch(what: str, file: str, error: Exception) -> UserError:
    """The error for weights that are not on this machine and cannot be downloaded.

    Args:
        what: The weights, in words.
        file: The file to fetch elsewhere.
        error: What the download raised.
    """
    reason = " ".join(str(error).partition("\n")[0].split())[:120]
    return UserError(
        f"{what} are not on this machine and cannot be downloaded ({type(error).__name__}: {reason}); fetch the file {file} "
        "elsewhere and name it: --network.backbone.weights FILE"
    )
