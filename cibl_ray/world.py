"""The processes that train one network together: the part of a batch that each has, and the collectives between them.

A single process is a world of size 1, where every collective returns its input. This module uses torch.distributed and does
not know what started the processes: Ray, torchrun or the user.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from pipelines.common.errors import UserError
from pipelines.loaders.reading import Share

T = TypeVar("T")

EXCHANGE_TIMEOUT = timedelta(minutes=10)  # without an answer, after which a worker counts as lost
_STILL_AT_WORK = 60.0  # seconds after which a worker that works longer says so, well below the above


class PeerLostError(RuntimeError):
    """A collective failed because another worker ended or does not answer. The cause is in that worker's own error."""


class World:
    """This process among the workers of the default process group, or alone.

    Only rank 0 writes files and shows progress.

    Args:
        alone: Whether to leave out the other workers: for what one of them computes by itself.

    Attributes:
        rank: This worker's number, from 0.
        size: The number of workers.
        communication_seconds: Wall-clock seconds that this process waited in collectives since it was last set to 0. On a GPU,
            collectives are only launched in that time.
        gradient_group: A process group of all workers for gradients alone, whose sums run beside other collectives; None for
            one process.
    """

    def __init__(self, alone: bool = False) -> None:
        joined = dist.is_available() and dist.is_initialized() and not alone
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1
        self.communication_seconds = 0.0
        # CPU tensors (objects, logits of the evaluation) use gloo, whatever backend the gradients use.
        self._cpu: dist.ProcessGroup | None = None
        self.gradient_group: dist.ProcessGroup | None = None
        if joined and dist.get_backend() != "gloo":
            self._cpu = dist.new_group(backend="gloo")  # type: ignore[assignment]  # a group of all ranks has every rank
        if self.size > 1:
            self.gradient_group = dist.new_group(timeout=EXCHANGE_TIMEOUT)  # type: ignore[assignment]  # as above

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        """The same world: a copied network has the workers of the first."""
        return self

    @property
    def is_rank0(self) -> bool:
        """Whether this worker writes files and shows progress."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This worker's share of every batch, as the loaders take it."""
        return Share(self.rank, self.size)

    def fraction(self, batch: int) -> float:
        """This worker's fraction, in (0, 1], of a batch of `batch` samples over all workers."""
        rows = self.share.of(batch)
        return (rows.stop - rows.start) / batch

    def gather(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """Gather the rows of all workers in the order of the batch. Differentiable.

        The gradient of a row is the sum of the gradients of all workers. Each worker scales its loss by its `fraction`; the
        sum over the workers is then the loss of the whole batch.

        Args:
            x: This worker's rows, (n·k, ...), k rows a sample.
            batch: Samples of the batch over all workers, N.

        Returns:
            The rows of all workers, (N·k, ...).
        """
        if self.size == 1:
            return x
        rows = [self.share.of(batch, worker) for worker in range(self.size)]
        each = len(x) // (rows[self.rank].stop - rows[self.rank].start)
        result: torch.Tensor = _Gather.apply(x, self, [(own.stop - own.start) * each for own in rows])
        return result

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the workers of a tensor that has the same shape on each."""
        if self.size > 1:
            x = x.clone()
            with self.timed_collective():
                dist.all_reduce(x)
        return x

    def gather_to_rank0(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the rows of a CPU tensor on rank 0, in the order of rank.

        Args:
            x: This worker's rows, (n, ...); n may differ between workers.

        Returns:
            All rows on rank 0, `x` itself on the others.
        """
        if self.size == 1:
            return x
        parts: list[torch.Tensor] = [x] * self.size
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(x)
        with self.timed_collective():
            dist.all_reduce(counts, group=self._cpu)
            if self.is_rank0:
                for worker in range(1, self.size):
                    parts[worker] = x.new_empty(int(counts[worker]), *x.shape[1:])
                    if counts[worker]:
                        dist.recv(parts[worker], worker, group=self._cpu)
            elif len(x):
                dist.send(x.contiguous(), 0, group=self._cpu)
        return torch.cat(parts) if self.is_rank0 else x

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result on every rank.

        Args:
            make: Takes as long as it needs, and calls no collective.

        Raises:
            UserError: On every rank, if `make` raises it on rank 0.
        """
        if self.size == 1:
            return make()

        def made() -> T | UserError | None:
            try:
                return make() if self.is_rank0 else None
            except UserError as error:
                return error

        box: list[Any] = [self.work_together(made)]
        with self.timed_collective():
            dist.broadcast_object_list(box, src=0, group=self._cpu)
        if isinstance(box[0], UserError):
            raise box[0]
        result: T = box[0]
        return result

    def work_together(self, work: Callable[[], T]) -> T:
        """Call `work`, and return when every worker's has returned. A worker whose takes long does not count as lost.

        Args:
            work: Calls no collective.

        Returns:
            What this worker's `work` returned.

        Raises:
            PeerLostError: Another worker ended.
        """
        if self.size == 1:
            return work()
        done = threading.Event()

        def say_so() -> None:
            with suppress(RuntimeError):  # a worker is lost: the collective below says so
                while not done.wait(_STILL_AT_WORK):
                    self._any_at_work(True)

        thread = threading.Thread(target=say_so, name="still at work", daemon=True)
        thread.start()
        try:
            result = work()
        finally:
            done.set()
            thread.join()
        with self.timed_collective():
            while self._any_at_work(False):
                pass
        return result

    def _any_at_work(self, own: bool) -> bool:
        at_work = torch.tensor(float(own))
        dist.all_reduce(at_work, group=self._cpu)
        return bool(at_work)

    def all_gather(self, value: T) -> list[T]:
        """The `value` of every worker, in the order of rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self.timed_collective():
                dist.all_gather_object(values, value, group=self._cpu)
        return values

    def close(self) -> None:
        """Forget the process groups, before they are destroyed."""
        self._cpu = self.gradient_group = None

    @contextmanager
    def timed_collective(self) -> Iterator[None]:
        """Count the context's seconds as communication.

        Raises:
            PeerLostError: A collective within it failed.
        """
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise PeerLostError(f"rank {self.rank} lost contact with the other workers: {reason}") from error
        finally:
            self.communication_seconds += time.perf_counter() - started


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, world: World, counts: list[int]) -> torch.Tensor:
        ctx.world, ctx.counts = world, counts
        most = max(counts)
        padded = x.detach().contiguous()
        if len(x) < most:
            padded = torch.cat((padded, padded.new_zeros(most - len(x), *x.shape[1:])))
        everyone = padded.new_empty(len(counts) * most, *x.shape[1:])
        with world.timed_collective():
            dist.all_gather([*everyone.split(most)], padded)
        if min(counts) == most:
            return everyone
        return torch.cat([part[:count] for part, count in zip(everyone.split(most), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grad.contiguous().clone()
        with ctx.world.timed_collective():
            dist.all_reduce(grad)
        return grad.split(ctx.counts)[ctx.world.rank], None, None


@functools.cache
def join() -> World:
    """The world of this process: the processes of torchrun if torchrun started it, else this process alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        # This module binds the current default group when it is imported, and optimizers import it. Imported after the group is
        # made, it would keep the group alive after `leave`.
        import torch.distributed.nn.functional

        cuda = torch.cuda.is_available()
        if cuda:
            rank = int(os.environ["LOCAL_RANK"])
            if rank < torch.cuda.device_count():  # the others can train on the CPU
                torch.cuda.set_device(rank)
        # Both backends with a GPU: train.device may still be the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=EXCHANGE_TIMEOUT)
    return World()


def require_own_gpu(device: str) -> None:
    """Check that each process of torchrun on this machine has a GPU of its own.

    Raises:
        UserError: `device` is 'cuda' and torchrun started more processes than there are GPUs.
    """
    if device == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
        started, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if started > gpus:
            raise UserError(f"torchrun started {started} processes for {gpus} GPUs; --nproc-per-node {gpus}, or --device cpu")


def leave() -> None:
    """Close the process group that `join` opened. Its threads must end before Python does, which aborts otherwise."""
    if "TORCHELASTIC_RUN_ID" in os.environ and dist.is_initialized():
        join().close()
        dist.destroy_process_group()
