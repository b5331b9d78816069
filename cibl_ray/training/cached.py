"""Micro-batches whose contrastive set is the whole step's: the network's outputs are cached, and gradients are exact.

GradCache (Gao et al. 2021, arXiv:2101.06983): every micro-batch runs without a graph first. The loss of all outputs gives the
gradient of each output. Then every micro-batch runs again, and its backward pass starts from these gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from cibl_ray.networks.network import Outputs
from cibl_ray.training.batch_norm import running_statistics_stay

Run = Callable[[nn.Module, torch.Tensor], Outputs]


class CachedPasses:
    """Runs networks on a step's images in micro-batches. One is for one step.

    Dropout drops the same in both runs. The running statistics of batch norm move in the second one.

    Args:
        run: Calls a network on the pixels of a micro-batch.
        parts: How many micro-batches.
        rows: Rows of each stream in the pixels of the network that is trained. A micro-batch has its part of each stream.
    """

    def __init__(self, run: Run, parts: int, rows: Sequence[int]) -> None:
        self._run, self._parts, self._rows = run, parts, rows
        self._network: nn.Module | None = None
        self._chunks: list[torch.Tensor] = []
        self._random: list[list[torch.Tensor]] = []
        self._cached: Outputs | None = None

    def __call__(self, network: nn.Module, pixels: torch.Tensor) -> Outputs:
        """The outputs for all pixels, (M, 3, S, S). Where gradients are computed, they are leaves that collect theirs."""
        if not torch.is_grad_enabled():
            return _joined([self._run(network, chunk) for chunk in pixels.chunk(self._parts)], [len(pixels)])
        self._network, self._chunks = network, self._split(pixels)
        outputs = []
        with torch.no_grad(), running_statistics_stay(network):
            for chunk in self._chunks:
                self._random.append(_random_state(pixels.device))
                outputs.append(self._run(network, chunk))
        joined = _joined(outputs, self._rows)
        self._cached = Outputs(
            logits=joined.logits.requires_grad_(),
            embeddings=_leaf(joined.embeddings),
            prototypes=_leaf(joined.prototypes),
            scale=joined.scale.detach().requires_grad_() if isinstance(joined.scale, torch.Tensor) else joined.scale,
        )
        return self._cached

    def backward(self, last: AbstractContextManager[None]) -> None:
        """Add up the parameters' gradients, after the loss has given the outputs theirs.

        Args:
            last: The context of the last micro-batch's backward pass.
        """
        assert self._network is not None
        assert self._cached is not None
        cached = self._cached
        logits, embeddings = (self._gradients(of) for of in (cached.logits, cached.embeddings))
        for number, (chunk, state) in enumerate(zip(self._chunks, self._random, strict=True)):
            with _random_again(state, chunk.device):
                outputs = self._run(self._network, chunk)
            known = _known(outputs.logits, logits[number]) + _known(outputs.embeddings, embeddings[number])
            ends = number == self._parts - 1
            if ends:  # functions of the weights alone, so the same in every micro-batch
                known += _known(outputs.prototypes, _gradient(cached.prototypes))
                known += _known(outputs.scale, _gradient(cached.scale))
            with last if ends else nullcontext():
                torch.autograd.backward([of for of, _ in known], [gradient for _, gradient in known])

    def _split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each micro-batch: a part of every stream."""
        streams = [stream.chunk(self._parts) for stream in x.split([*self._rows])]
        return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*streams, strict=True)]

    def _gradients(self, output: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        """The gradient of a leaf, by micro-batch."""
        gradient = _gradient(output)
        return [None] * self._parts if gradient is None else self._split(gradient)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """The state of the random generators that a network on `device` may use."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _random_again(state: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """A context with the random numbers that followed `state`; afterwards the generators are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield


def _joined(outputs: list[Outputs], rows: Sequence[int]) -> Outputs:
    """The outputs of all micro-batches, stream by stream."""

    def join(each: list[torch.Tensor]) -> torch.Tensor:
        sizes = [count // len(outputs) for count in rows]
        return torch.cat([part for stream in zip(*(x.split(sizes) for x in each), strict=True) for part in stream])

    embeddings = [each.embeddings for each in outputs if each.embeddings is not None]
    return Outputs(
        logits=join([each.logits for each in outputs]),
        embeddings=join(embeddings) if embeddings else None,
        prototypes=outputs[-1].prototypes,
        scale=outputs[-1].scale,
    )


def _leaf(output: torch.Tensor | None) -> torch.Tensor | None:
    return None if output is None else output.requires_grad_()


def _gradient(output: torch.Tensor | float | None) -> torch.Tensor | None:
    return output.grad if isinstance(output, torch.Tensor) else None


def _known(output: torch.Tensor | float | None, gradient: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An output with its gradient, where it has one and parameters depend on it."""
    if not isinstance(output, torch.Tensor) or gradient is None or not output.requires_grad:
        return []
    return [(output, gradient)]
