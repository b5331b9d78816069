"""Whether the loss is still finite, without a step that waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipelines.common.errors import UserError

_EVERY = 50  # steps between two looks


class FiniteLoss:
    """Looks at the sum of an epoch's losses now and then.

    Args:
        epoch: Number of the epoch, from 0.
        lr: Learning rate of the run, for the message.
    """

    def __init__(self, epoch: int, lr: float) -> None:
        self._epoch, self._lr = epoch, lr
        self._watch: _Watch | None = None

    def watch(self, total: torch.Tensor, step: int) -> None:
        """Look at `total`, the sum of the losses up to `step`, some steps later.

        Raises:
            UserError: An earlier sum was not finite.
        """
        if step % _EVERY:
            return
        if self._watch is not None:
            self._watch.look()
        self._watch = _Watch(total, partial(self.check, step=step))

    def check(self, total: torch.Tensor, step: int) -> None:
        """Look at `total` now.

        Raises:
            UserError: It is not finite.
        """
        if not torch.isfinite(total):
            raise UserError(
                f"the loss is not finite in epoch {self._epoch + 1}, by step {step}; lower optimizer.lr "
                f"(it is {self._lr}), set optimizer.clip_norm, or train.precision: fp32; "
                f"checkpoints up to epoch {self._epoch} are kept"
            )


class _Watch:
    """A value on its way from the device, looked at when it has long arrived: training never waits for it."""

    def __init__(self, value: torch.Tensor, check: Callable[[torch.Tensor], None]) -> None:
        self._check = check
        self._value = torch.empty((), pin_memory=value.is_cuda).copy_(value, non_blocking=True)
        self._arrived = torch.cuda.Event() if value.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def look(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()
        self._check(self._value)
