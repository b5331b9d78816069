"""The rows of all processes of a distributed run, with exact gradients, for loss modules in any training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Rows:
    """How many rows of a batch each process has.

    Attributes:
        counts: Rows of each process, in the order of rank.
        rank: This process.
    """

    counts: list[int]
    rank: int

    @property
    def start(self) -> int:
        """The first of this process's rows among all rows."""
        return sum(self.counts[: self.rank])

    @property
    def scale(self) -> float:
        """The factor that makes a mean over this process's rows count as its rows do.

        DistributedDataParallel averages the gradients of the processes. With this factor on each loss that is the gradient of
        the mean over all rows, also where processes have different numbers of them. It is 1 where they have equally many.
        """
        return self.counts[self.rank] * len(self.counts) / max(1, sum(self.counts))


def agree_on_rows(rows: int, error: ValueError | None, device: torch.device) -> Rows | None:
    """Exchange the numbers of rows; every process of the default group calls it.

    Args:
        rows: Of this process.
        error: Why this process refuses its input; None: it does not.
        device: Where the process group's tensors are.

    Returns:
        The rows of all processes; None where there is one process alone.

    Raises:
        ValueError: `error`, or that another process has one: no process is left waiting for a collective.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return None
    own = torch.tensor([-1 if error is not None else rows], device=device)
    everyone = own.new_empty(dist.get_world_size())
    dist.all_gather([*everyone.split(1)], own)
    counts = everyone.tolist()
    if error is not None:
        raise error
    if -1 in counts:
        raise ValueError(f"rank {counts.index(-1)} refused its input of this step; its own error says why")
    return Rows(counts, dist.get_rank())


def gather(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Gather the rows of all processes in the order of rank. Differentiable.

    The gradient of a row is the sum of the gradients that all processes have for it.

    Args:
        x: This process's rows, (M, ...).
        rows: The rows of all processes.

    Returns:
        The rows of all processes, (A, ...), A the sum of their numbers.
    """
    if not any(rows.counts):
        return x
    result: torch.Tensor = _Gather.apply(x, rows)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        most = max(rows.counts)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        everyone = padded.new_empty(len(rows.counts) * most, *x.shape[1:])
        dist.all_gather([*everyone.split(most)], padded)
        return torch.cat([part[:count] for part, count in zip(everyone.split(most), rows.counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = grad.contiguous().clone()
        dist.all_reduce(summed)
        return summed.split(ctx.rows.counts)[ctx.rows.rank], None
