"""Networks compiled by torch.compile; on a GPU their passes are replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cibl_ray.hardware import out_of_memory
from pipelines.common.errors import UserError


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile calls of a network, at the first call of each shape. Its parameters keep their names.

    Its other methods (`classify`, for evaluation) run as before.

    Args:
        network: The network.
        device: Where it is.
    """
    mode = "reduce-overhead" if device.type == "cuda" else None
    network.compile(mode=mode, dynamic=False)  # a run has two shapes at most, and CUDA graphs need exact shapes


def begin_step(compiled: bool) -> None:
    """Mark the start of a training step, so that CUDA graphs may overwrite the memory of earlier steps.

    Without it every call of a network counts as a step, and the averaged network's embeddings are overwritten before the loss
    is computed.

    Args:
        compiled: Whether the run's networks are compiled.
    """
    if compiled:
        torch.compiler.cudagraph_mark_step_begin()


@contextmanager
def explained() -> Iterator[None]:
    """Raise a missing or failing compiler as a UserError."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not out_of_memory(cause):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])  # the second says what it was
        raise UserError(
            f"train.compile: true, but the network cannot be compiled here ({reason}); set train.compile: false"
        ) from error
