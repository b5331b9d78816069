"""The workers that train one network together: what each has to do of a batch, and how they tell each other.

One process alone is a world of size 1, in which every operation here returns what it was given. Knows torch.distributed,
not who started the processes: Ray or torchrun.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from pipelines.common.errors import UserError
from pipelines.loaders.reading import Share

T = TypeVar("T")


class PeerLostError(RuntimeError):
    """An exchange between workers failed: another worker ended, or does not answer. Its cause lies with that worker."""


class World:
    """rank of size workers. Rank 0 alone writes files and shows progress.

    seconds: spent in exchanges since `seconds` was last set to 0, by this worker's clock (on a GPU: to start them).
    """

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1
        self.seconds = 0.0
        # What lies on the CPU (objects, logits of the evaluation) goes by gloo, whatever the gradients take.
        self._cpu: dist.ProcessGroup | None = None
        if joined and dist.get_backend() != "gloo":
            self._cpu = dist.new_group(backend="gloo")  # type: ignore[assignment]  # a group of all ranks has every rank

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> Share:
        return Share(self.rank, self.size)

    def fraction(self, batch: int) -> float:
        """This worker's part of a batch of `batch` samples over all workers."""
        rows = self.share.of(batch)
        return (rows.stop - rows.start) / batch

    def gather(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """Every worker's rows of x in the batch's order, (N·k, ...), from this worker's, (n·k, ...); k rows a sample.

        Differentiable: the gradient of a row is the sum of what all workers ask of it. The losses of all workers add up, each
        scaled by its `fraction`, to the loss of the whole batch.
        """
        if self.size == 1:
            return x
        rows = [self.share.of(batch, worker) for worker in range(self.size)]
        each = len(x) // (rows[self.rank].stop - rows[self.rank].start)
        result: torch.Tensor = _Gather.apply(x, self, [(own.stop - own.start) * each for own in rows])
        return result

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up all workers' gradients, in a fixed order: a run repeats itself to the bit."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with self._exchange():
            dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def average_statistics(self, networks: Iterable[nn.Module]) -> None:
        """Give all workers the mean of their running statistics: in training each normalises by its own part of a batch."""
        if self.size == 1:
            return
        buffers = [
            buffer
            for network in networks
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        flat = torch.cat(buffers)
        with self._exchange():
            dist.all_reduce(flat)
        for buffer, mean in zip(buffers, flat.div_(self.size).split([len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(mean)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all workers of a tensor of the same shape on each."""
        if self.size > 1:
            x = x.clone()
            with self._exchange():
                dist.all_reduce(x)
        return x

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """All workers' rows of a CPU tensor in the order of rank, on rank 0; the others get their own back."""
        if self.size == 1:
            return x
        parts: list[torch.Tensor] = [x] * self.size
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(x)
        with self._exchange():
            dist.all_reduce(counts, group=self._cpu)
            if self.first:
                for worker in range(1, self.size):
                    parts[worker] = x.new_empty(int(counts[worker]), *x.shape[1:])
                    if counts[worker]:
                        dist.recv(parts[worker], worker, group=self._cpu)
            elif len(x):
                dist.send(x.contiguous(), 0, group=self._cpu)
        return torch.cat(parts) if self.first else x

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; a UserError that it raises there is raised on every rank."""
        if self.size == 1:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [make()]
            except UserError as error:
                box = [error]
        with self._exchange():
            dist.broadcast_object_list(box, src=0, group=self._cpu)
        if isinstance(box[0], UserError):
            raise box[0]
        result: T = box[0]
        return result

    def everyones(self, value: T) -> list[T]:
        """Each worker's `value`, in the order of rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self._exchange():
                dist.all_gather_object(values, value, group=self._cpu)
        return values

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise PeerLostError(f"rank {self.rank} lost contact with the other workers: {reason}") from error
        finally:
            self.seconds += time.perf_counter() - started


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, world: World, counts: list[int]) -> torch.Tensor:
        ctx.world, ctx.counts = world, counts
        most = max(counts)
        padded = x.detach().contiguous()
        if len(x) < most:
            padded = torch.cat((padded, padded.new_zeros(most - len(x), *x.shape[1:])))
        everyone = padded.new_empty(len(counts) * most, *x.shape[1:])
        with world._exchange():
            dist.all_gather([*everyone.split(most)], padded)
        if min(counts) == most:
            return everyone
        return torch.cat([part[:count] for part, count in zip(everyone.split(most), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grad.contiguous().clone()
        with ctx.world._exchange():
            dist.all_reduce(grad)
        return grad.split(ctx.counts)[ctx.world.rank], None, None


@functools.cache
def join() -> World:
    """The world of this process: of torchrun's processes where it was started by torchrun, else itself alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        # Its default arguments are the group there is when it is imported, and optimizers import it: `leave` would end nothing.
        import torch.distributed.nn.functional

        cuda = torch.cuda.is_available()
        if cuda:
            rank = int(os.environ["LOCAL_RANK"])
            if rank < torch.cuda.device_count():  # the others can train on the CPU
                torch.cuda.set_device(rank)
        # Both, where there is a GPU: train.device may be the CPU all the same.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    return World()


def need_own_device(device: str) -> None:
    """Raises UserError where torchrun started more processes on this machine than it has GPUs for."""
    if device == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
        started, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if started > gpus:
            raise UserError(f"torchrun started {started} processes for {gpus} GPUs; --nproc-per-node {gpus}, or --device cpu")


def leave() -> None:
    """End what `join` began: the exchange's threads must not outlive Python, which aborts where they still hold tensors."""
    if "TORCHELASTIC_RUN_ID" in os.environ and dist.is_initialized():
        join()._cpu = None
        dist.destroy_process_group()
