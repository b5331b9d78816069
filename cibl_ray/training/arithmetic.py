"""Which arithmetic a run computes with: decided by timing a few steps of its own network.

A short run is not worth it and keeps the rule of `hardware.resolve`. What was measured is kept for each machine, network and
batch in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from cibl_ray.config import RunConfig, TrainConfig
from cibl_ray.hardware import describe, has_bf16, out_of_memory
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.network import Outputs, build_network
from cibl_ray.training.compiled import begin_step, compile_network
from cibl_ray.training.optimizer import make_optimizer
from cibl_ray.training.setup import checkpoint_activations
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.common.files import write_atomically

log = logging.getLogger(__name__)

_WARM, _TIMED = 1, 3  # steps
_WORTH_PRECISION, _WORTH_COMPILING = 600.0, 1800.0  # seconds of a run, from which on its arithmetic is timed
_CLEARLY = 1.03  # as much faster compiled steps must be: compiling costs half a minute, and each start again


@dataclass(frozen=True)
class Arithmetic:
    """What a step is computed with."""

    precision: Literal["fp32", "bf16"]
    compile: bool

    def __str__(self) -> str:
        return f"{self.precision}{', compiled' if self.compile else ''}"


def decide(
    config: RunConfig, asked: TrainConfig, batches: int, classes: int, workers: int = 1, cache: Path | None = None
) -> RunConfig:
    """Decide what the run left to `auto`, where the run is long enough for it.

    Args:
        config: The run's configuration, resolved for this machine.
        asked: What the configuration said before: where it says 'auto', this decides.
        batches: Steps of an epoch.
        classes: C.
        workers: Each computes its part of a batch.
        cache: File of what was measured before; None: in the user's cache folder.

    Returns:
        The configuration with precision and compilation decided.
    """
    known = Arithmetic(config.train.precision, config.train.compile is True)  # type: ignore[arg-type]
    choices = candidates(asked, config.train.device, known)
    if len(choices) == 1 or config.train.tune == "head":
        return config
    file = cache or _cache_file()
    measured = _read(file)
    key = _key(config, classes, workers)
    before: dict[str, float] = measured.get(key, {})
    seconds = _Timer(config, classes, workers)
    steps = batches * config.train.epochs

    def worth(step: float) -> set[Arithmetic]:
        return {choice for choice in choices if steps * step >= (_WORTH_COMPILING if choice.compile else _WORTH_PRECISION)}

    rates = before
    # What is compared is timed in one go: an earlier run may have had other work beside it.
    if str(known) not in before or not {str(choice) for choice in worth(before[str(known)])} <= before.keys():
        if steps < 100 * (_WARM + _TIMED):  # within a hundredth of the run
            return config
        try:
            rates = {str(known): seconds(known)}
        except _NoMemoryError:
            return config  # the run itself says what to change
    wanted = worth(rates[str(known)])
    for choice in choices:
        if choice in wanted and str(choice) not in rates:
            try:
                rates[str(choice)] = seconds(choice)
            except UserError as error:
                log.warning("train.compile auto: %s", error)
                rates[str(choice)] = math.inf  # kept, so that not every run tries again
            except _NoMemoryError:
                log.info("train.precision and train.compile auto: too little memory for %s", choice)
    # What an earlier, longer run measured serves a short one, too; but compiling costs each start half a minute.
    compared = {
        choice: rates[str(choice)]
        for choice in choices
        if str(choice) in rates and (choice in {known, *wanted} or not choice.compile)
    }
    best = fastest(compared)
    if len(rates) > 1 and rates != before:
        _write(file, measured | {key: rates})
    if len(compared) > 1:
        images, named = config.train.batch_size, sorted((str(choice), each) for choice, each in compared.items())
        listed = ", ".join(f"{name} {images / each:,.0f} img/s" for name, each in named if each < math.inf)
        log.info("train.precision and train.compile auto: %s, of %s", best, listed)
    return _with(config, best)


def candidates(asked: TrainConfig, device: str, known: Arithmetic) -> list[Arithmetic]:
    """What may be chosen: as `asked` fixes it, and of the rest what this machine has."""
    precisions: Sequence[Literal["fp32", "bf16"]] = (known.precision,)
    if asked.precision == "auto":
        precisions = ("fp32", "bf16") if has_bf16(device) else ("fp32",)
    may_compile = asked.compile == "auto" and asked.accumulate == 1 and asked.batch_norm != "sync"
    compiles = (False, True) if may_compile else (known.compile,)
    return [Arithmetic(precision, compiled) for compiled in compiles for precision in precisions]


def fastest(seconds: dict[Arithmetic, float]) -> Arithmetic:
    """The choice of the least seconds a step; a compiled one must gain some percent."""
    return min(seconds, key=lambda choice: seconds[choice] * (_CLEARLY if choice.compile else 1))


def time_steps(config: RunConfig, classes: int, choices: Sequence[Arithmetic]) -> dict[Arithmetic, float]:
    """Time a run's steps on random images.

    Args:
        config: The run's configuration.
        classes: C.
        choices: What to compute them with.

    Returns:
        Seconds of a step, by choice.

    Raises:
        UserError: The network cannot be compiled.
    """
    seconds = _Timer(config, classes)
    return {choice: seconds(choice) for choice in choices}


class _NoMemoryError(Exception):
    """A step does not fit into memory."""


class _Timer:
    """Seconds of a worker's step of a run's network on random images, by arithmetic."""

    def __init__(self, config: RunConfig, classes: int, workers: int = 1) -> None:
        self._config, self._classes, self._workers = config, classes, workers

    def __call__(self, choice: Arithmetic) -> float:
        try:
            step = self._step(choice)
            for _ in range(_WARM):
                step()
            _wait(self._config.train.device)
            begun = time.perf_counter()
            for _ in range(_TIMED):
                step()
            _wait(self._config.train.device)
            return (time.perf_counter() - begun) / _TIMED
        except Exception as error:
            if out_of_memory(error):
                raise _NoMemoryError from error
            if not choice.compile:
                raise
            raise UserError(f"this network cannot be compiled here ({str(error).strip().partition(chr(10))[0]})") from error

    def _step(self, choice: Arithmetic) -> Callable[[], None]:
        config, train = self._config, self._config.train
        device, needs = torch.device(train.device), config.loss.needs
        micro = max(2, train.batch_size // (train.accumulate * self._workers))  # batch norm of a vector needs two
        network = build_network(config.network, self._classes, needs, config.seed, image_size=config.data.size).to(device)
        network.freeze(train.tune, train.partial)
        network.train()
        if train.checkpoint_activations:
            checkpoint_activations(network.backbone, config.network.backbone.title)
        objective = Objective(config.loss, network, np.ones(self._classes, np.int64), device, World(alone=True), micro)
        optimizer = make_optimizer(network, config.optimizer, fused=device.type == "cuda")
        if choice.compile:
            for each in objective.networks:
                compile_network(each, device)
        views = [len(config.data.views)] + ([len(needs.second_stream.views)] if needs.second_stream is not None else [])
        streams = [self._images(micro, count, device) for count in views]

        def run(network: nn.Module, pixels: torch.Tensor) -> Outputs:
            with torch.autocast(device.type, torch.bfloat16, enabled=choice.precision == "bf16"):
                outputs: Outputs = network(pixels)
            return outputs

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            objective.begin_step()
            for _ in range(train.accumulate):
                begin_step(choice.compile)
                objective(network, run, streams, 0.0)["loss"].backward()
            optimizer.step()

        return step

    def _images(self, batch: int, views: int, device: torch.device) -> Images:
        size = self._config.data.size
        random = torch.Generator().manual_seed(0)
        pixels = torch.randn(batch * views, 3, size, size, generator=random).to(device, memory_format=torch.channels_last)
        return Images(pixels, torch.randint(self._classes, (batch,), generator=random).to(device), views)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _with(config: RunConfig, choice: Arithmetic) -> RunConfig:
    return config.with_train(precision=choice.precision, compile=choice.compile)


def _key(config: RunConfig, classes: int, workers: int) -> str:
    """Names what the speed of a step depends on: machine, network, loss, batch and views."""
    content: dict[str, Any] = {
        "machine": describe(config.train.device),
        "torch": torch.__version__,
        "network": config.network.model_dump(mode="json"),
        "loss": config.loss.model_dump(mode="json"),
        "tune": config.train.tune,
        "batch": [config.train.batch_size, config.train.accumulate, len(config.data.views), config.data.size, classes],
    }
    if config.train.tune == "partial":
        content["partial"] = config.train.partial.model_dump(mode="json")
    if workers > 1:
        content["workers"] = workers
    if config.train.checkpoint_activations:
        content["checkpoint_activations"] = True
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/") / ".cache"
    return Path(home) / "cibl-ray" / "arithmetic.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1))
    except OSError as error:
        log.warning("%s cannot be written (%s): the next run times its steps again", file, error)
