"""The sum of all workers' gradients, taken while the backward pass still computes.

A backward pass computes the gradients of the last layers first. They are collected in buckets, and each full bucket is summed
over the workers while the rest of the pass runs (Li et al. 2020, arXiv:2006.15704). The buckets are fixed when training
starts, so a resumed run adds in the same order as an unbroken one.

torch's DistributedDataParallel is not used, because it forms its buckets again after the first step: a resumed run would add
in another order. It also takes the mean, and here the sum is needed (`World.fraction`). docs/explanation/scaling.md compares
their speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from cibl_ray.world import World

BUCKET_BYTES = 2**20


class GradientExchange:
    """Sums the gradients of a network over the workers.

    Buckets are summed in one order on every worker, in a process group of their own. So they cannot meet the collectives of a
    loss, which run in the same backward pass. All workers must compute the same graph: a parameter without a gradient has none
    on any of them, and keeps none.

    Args:
        parameters: Those of the network, in the order of its layers; frozen ones are left out.
        world: The workers; with one there is nothing to do.
        bucket_bytes: Gradients that are summed in one call, in bytes.
        wire: Type that gradients have on their way; None: their own. A 16-bit type halves the traffic and rounds each gradient.

    Attributes:
        bucket_bytes: The size of each bucket, in the order in which they are summed.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        world: World,
        bucket_bytes: int = BUCKET_BYTES,
        wire: torch.dtype | None = None,
    ) -> None:
        self._world = world
        self._buckets: list[_Bucket] = []
        self.bucket_bytes: list[int] = []
        self._launched = 0
        self._summing = False
        if world.size == 1:
            return
        # Layers that are computed last have their gradients first.
        trained = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self._buckets = [_Bucket(group, wire) for group in _grouped(trained, bucket_bytes)]
        self.bucket_bytes = [sum(each.nbytes for each in bucket.parameters) for bucket in self._buckets]
        for bucket in self._buckets:
            for place, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket, place))

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Replace the gradients by their sums over the workers.

        The last backward pass of a step runs within this context. Each sum includes what earlier passes have accumulated.

        Raises:
            PeerLostError: Another worker ended or does not answer.
        """
        self._launched, self._summing = 0, True
        for bucket in self._buckets:
            bucket.begin()
        try:
            yield
            for bucket in self._buckets[self._launched :]:
                bucket.fill()
                self._launch(bucket)
            with self._world.timed_collective():
                for bucket in self._buckets:
                    bucket.wait()
        finally:
            self._summing = False

    def _arrived(self, bucket: _Bucket, place: int, parameter: torch.Tensor) -> None:
        """The hook of a parameter: its gradient of this backward pass is whole."""
        if not self._summing:
            return
        bucket.take(place)
        # In this order alone: workers whose gradients arrive in another order still launch the same sums one after the other.
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            self._launch(self._buckets[self._launched])
            self._launched += 1

    def _launch(self, bucket: _Bucket) -> None:
        with self._world.timed_collective():
            bucket.launch(self._world.gradient_group)


class _Bucket:
    """Some parameters whose gradients lie next to each other in memory.

    Args:
        parameters: Of one type, on one device.
        wire: Type on the way; None: that of the parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], wire: torch.dtype | None) -> None:
        self.parameters = parameters
        self.missing: set[int] = set()
        first, sizes = parameters[0], [parameter.numel() for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        # Gradients have the strides of their parameters; so nothing is transposed when one is copied.
        self._views = [
            part.as_strided(parameter.size(), parameter.stride()) if _dense(parameter) else part.view(parameter.size())
            for parameter, part in zip(parameters, self._flat.split(sizes), strict=True)
        ]
        self._wire = self._flat if wire is None else torch.zeros_like(self._flat, dtype=wire)
        self._work: dist.Work | None = None

    def begin(self) -> None:
        """Forget the last step."""
        self.missing = set(range(len(self.parameters)))
        self._work = None

    def take(self, place: int) -> None:
        """Move the gradient of the parameter at `place` into the bucket."""
        if place not in self.missing:
            raise RuntimeError("a parameter got a gradient twice in one backward pass: its bucket may be on its way already")
        self.missing.remove(place)
        parameter, view = self.parameters[place], self._views[place]
        assert parameter.grad is not None
        view.copy_(parameter.grad)
        parameter.grad = view

    def fill(self) -> None:
        """Complete the bucket: parameters that got nothing in this pass have what they had, or no gradient."""
        for place in sorted(self.missing):
            if self.parameters[place].grad is not None:
                self.take(place)
            else:
                self._views[place].zero_()

    def launch(self, group: dist.ProcessGroup | None) -> None:
        """Start the sum."""
        if self._wire is not self._flat:
            self._wire.copy_(self._flat)
        self._work = dist.all_reduce(self._wire, group=group, async_op=True)

    def wait(self) -> None:
        """Wait for the sum; on a GPU, only later kernels wait."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        if self._wire is not self._flat:
            self._flat.copy_(self._wire)


def _grouped(parameters: list[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, in groups of one type and device that have `bucket_bytes` or a little more."""
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if group and (size >= bucket_bytes or (parameter.dtype, parameter.device) != (group[0].dtype, group[0].device)):
            yield group
            group, size = [], 0
        group.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if group:
        yield group


def _dense(parameter: torch.Tensor) -> bool:
    """Whether the parameter's strides reach each of its `numel` places in memory once."""
    reach = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.size(), strict=True)):
        if size > 1:
            if stride != reach:
                return False
            reach *= size
    return True
