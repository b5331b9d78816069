"""torch's SGD, without the seconds that it takes to import torch's compiler.

torch wraps an optimizer's methods so that code which it compiles stays out of them, and imports the compiler for that at the
first call: two to three seconds of every process that trains. We compile networks alone, never a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

# The functions below torch's wrappers, where there are any.
_add: Callable[..., None] = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_zero: Callable[..., None] = inspect.unwrap(torch.optim.Optimizer.zero_grad)
_step: Callable[..., Any] = inspect.unwrap(torch.optim.SGD.step)


class Sgd(torch.optim.SGD):
    """`torch.optim.SGD`, to the bit; without closures and `differentiable`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _add(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _zero(self, set_to_none)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        _step(self)
