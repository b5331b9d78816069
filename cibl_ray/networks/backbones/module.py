"""A backbone from the user's own code, named by its Python path."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from pathlib import Path

import torch
from torch import nn

from pipelines.common.errors import UserError

_SIZES = (64, 224, 32)  # pixels of a side that a network is tried with after the run's own, for the number of its features


def build(path: str, image_size: int | None) -> tuple[nn.Module, int]:
    """Call the function that `path` names.

    Args:
        path: "package.module.function"; the folder that the command runs in is searched, too.
        image_size: Pixels of a side, which some networks are fixed at; None: not known.

    Returns:
        The network, images (M, 3, S, S) to features (M, d_h), and d_h.

    Raises:
        UserError: There is no such function, or what it returns is not such a network.
    """
    module, _, name = path.rpartition(".")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"network.backbone.path {path!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    finally:
        if added:
            sys.path.remove(here)
    network = function()
    if not isinstance(network, nn.Module):
        raise UserError(f"network.backbone.path {path!r} returns a {type(network).__name__}; it must return a torch.nn.Module")
    return network, _features(network, path, (image_size, *_SIZES) if image_size else _SIZES)


def code(path: str, network: nn.Module) -> str:
    """A digest of the files that define the function and the classes of the network's layers, those of torch left out.

    Not of what the network makes of an image: rounding differs between machines and numbers of threads, and a digest of rounded
    numbers still differs where one of them is near an edge.

    Args:
        path: "package.module.function", which has been imported.
        network: What it returned.
    """
    names = {path.rpartition(".")[0], *(type(layer).__module__ for layer in network.modules())}
    modules = [sys.modules[name] for name in names if name in sys.modules and name.partition(".")[0] != "torch"]
    digests = set()
    for module in modules:
        try:
            digests.add(hashlib.sha256(Path(inspect.getfile(module)).read_bytes()).hexdigest())
        except (TypeError, OSError):  # a notebook's cell
            continue
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _features(network: nn.Module, path: str, sizes: tuple[int, ...]) -> int:
    """d_h, by a try on blank images."""
    was_training, problems = network.training, []
    network.eval()
    try:
        for size in sizes:
            try:
                with torch.inference_mode():
                    features = network(torch.zeros(2, 3, size, size))
            except Exception as error:  # the network's own code says in its own way that it does not take this size
                problems.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
                continue
            if isinstance(features, torch.Tensor) and features.ndim == 2:
                return features.shape[1]
            shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise UserError(f"network.backbone.path {path!r} gives {shape} for 2 images; features (2, d) are needed")
    finally:
        network.train(was_training)
    raise UserError(f"network.backbone.path {path!r} takes no images (2, 3, S, S) of {sizes} pixels ({problems[0]})")
