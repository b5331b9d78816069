"""Networks whose forward and backward passes torch.compile has fused; on a GPU they are replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cibl_ray.hardware import out_of_memory
from pipelines.common.errors import UserError


def compile_network(network: nn.Module, device: torch.device) -> None:
    """From now on calls of `network` are compiled, at the first call of each shape; its parameters and their names stay.

    Other methods of it (`classify`, for evaluation) run as before.
    """
    mode = "reduce-overhead" if device.type == "cuda" else None
    network.compile(mode=mode, dynamic=False)  # a run knows two shapes at most, and CUDA graphs want each exactly


def begin_step(compiled: bool) -> None:
    """Mark the start of a training step: what earlier steps left in the memory of CUDA graphs may be overwritten.

    Without it every call of a network would be a step, and an averaged network's embeddings would be gone before the loss is
    computed.
    """
    if compiled:
        torch.compiler.cudagraph_mark_step_begin()


@contextmanager
def explained() -> Iterator[None]:
    """A compiler that is missing or fails, as a UserError."""
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
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"train.compile: true, but the network cannot be compiled here ({reason}); set train.compile: false"
        ) from error
