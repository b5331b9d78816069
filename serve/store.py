"""The models of a service: loaded from bundles, swapped for new versions in their place, never for one that does not work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cibl_ray.bundle.card import MANIFEST, Bundle, open_bundle
from cibl_ray.bundle.runtime import Runtime
from pipelines.common.errors import UserError
from serve.engine import Engine
from serve.metrics import Metrics
from serve.settings import ReplicaConfig

log = logging.getLogger(__name__)
_State = tuple[tuple[str, int, int, int], ...]


@dataclass
class Statistics:
    """What a model has done since it was loaded, as Triton's statistics count: requests of the v2 protocol, in nanoseconds."""

    requests: int = 0
    images: int = 0
    nanoseconds: int = 0
    failures: int = 0
    failure_nanoseconds: int = 0
    last: int = 0  # milliseconds since 1970

    def answered(self, images: int, nanoseconds: int) -> None:
        """Count a request that was answered.

        Args:
            images: Of the request.
            nanoseconds: It took.
        """
        self.requests += 1
        self.images += images
        self.nanoseconds += nanoseconds
        self.last = int(1000 * time.time())

    def failed(self, nanoseconds: int) -> None:
        """Count a request that was refused.

        Args:
            nanoseconds: It took.
        """
        self.failures += 1
        self.failure_nanoseconds += nanoseconds


@dataclass(eq=False)
class Model:
    """A bundle at work.

    Attributes:
        bundle: What was loaded.
        engine: Runs the precision that answers where a request names none.
        engines: Runs each precision that is loaded.
        sha256: Of the file that `engine` runs.
        files: Open descriptors by precision, so that downloads stay this version while another takes its place on disk.
        statistics: Of its requests.
    """

    bundle: Bundle
    engine: Engine
    engines: dict[str, Engine]
    sha256: str
    files: dict[str, int]
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        # When no request has this model any more. The engine answers all that it was asked before.
        weakref.finalize(self, _close, [*self.engines.values()], [*self.files.values()])

    @property
    def name(self) -> str:
        """The model's name for its clients."""
        return self.bundle.card.name

    @property
    def version(self) -> str:
        """As the Open Inference Protocol names it."""
        return self.sha256[:12]


class Store:
    """The models of a replica.

    Attributes:
        failed: Model name -> why its new version is not in use.
    """

    def __init__(self, config: ReplicaConfig, metrics: Metrics) -> None:
        """Start empty.

        Args:
            config: The settings.
            metrics: Counts batches and failed updates.
        """
        self._config, self._metrics = config, metrics
        self._at: dict[Path, Model] = {}  # by the bundle's place
        self._seen: dict[Path, _State | None] = {}
        self.failed: dict[str, str] = {}
        self._changing = asyncio.Lock()

    @property
    def models(self) -> dict[str, Model]:
        """The models by name."""
        return {model.name: model for model in self._at.values()}

    @property
    def healthy(self) -> bool:
        """Whether every model's thread is at work."""
        return all(engine.alive for model in self._at.values() for engine in model.engines.values())

    async def set(self, bundles: tuple[Path, ...]) -> None:
        """Serve these bundles.

        Args:
            bundles: The folders. Those that are loaded already stay.

        Raises:
            UserError: One of them does not load. Everything stays as it was.
        """
        async with self._changing:
            places = [path.expanduser().absolute() for path in bundles]
            seen = {path: _state(path) for path in places}
            try:
                at = {path: self._at.get(path) or await self._load(path) for path in places}
            except Exception:
                self._metrics.failed_update()
                raise
            names = [model.name for model in at.values()]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"two bundles have the name {twice!r}; export one under another: --name")
            for path, model in at.items():
                if path not in self._at:  # read just now
                    self.failed.pop(model.name, None)
            self._at, self._seen = at, {path: self._seen.get(path, state) for path, state in seen.items()}

    async def watch(self) -> None:
        """Load new versions of bundles when they appear, until cancelled. A version that does not work is not used."""
        while True:
            await asyncio.sleep(self._config.watch_seconds)
            for path in list(self._at):
                state = await asyncio.to_thread(_state, path)
                if state is not None and state != self._seen.get(path):
                    await self._swap(path, state)

    async def _swap(self, path: Path, state: _State) -> None:
        async with self._changing:
            if path not in self._at:  # taken away meanwhile
                return
            before = self._at[path]
            self._seen[path] = state
            try:
                model = await self._load(path)
                # Under another name the model would be gone for those who ask for it by its own.
                if model.name != before.name:
                    raise UserError(
                        f"{str(path)!r} has the name {model.name!r}; export with --name {before.name}, "
                        f"or restart the service to serve {model.name!r} in its place"
                    )
            except Exception as error:  # whatever is wrong with it, the version that works stays, and the watch continues
                self.failed[before.name] = str(error)
                self._metrics.failed_update()
                log.error("the new version of %s is not used: %s", before.name, error)
                return
            self.failed.pop(before.name, None)
            self._at = {**self._at, path: model}
            log.warning("%s: now %s, before %s", model.name, model.version, before.version)

    async def _load(self, path: Path) -> Model:
        """A model that has answered a real inference in each precision."""
        config = self._config

        def load() -> tuple[Bundle, dict[str, Runtime], dict[str, int]]:
            state = _state(path)
            bundle = open_bundle(path)
            runtimes: dict[str, Runtime] = {}
            for precision in config.precisions:
                if precision not in bundle.models:
                    raise UserError(f"{str(path)!r} has no {precision} model; it has {', '.join(bundle.models)}")
                runtimes[precision] = Runtime(bundle.models[precision].path, config.provider, config.threads)
                _try(runtimes[precision], bundle)
            files = {name: os.open(entry.path, os.O_RDONLY) for name, entry in bundle.models.items()}
            if _state(path) != state:  # the manifest of one version, and the model of another
                for file in files.values():
                    os.close(file)
                raise UserError(f"{str(path)!r} was replaced while it was read; it is read again")
            return bundle, runtimes, files

        bundle, runtimes, files = await asyncio.to_thread(load)
        name = bundle.card.name

        def count(images: int) -> None:
            self._metrics.batch(name, images)

        engines = {precision: Engine(runtime, config.max_batch, count) for precision, runtime in runtimes.items()}
        return Model(bundle, engines[config.precision], engines, bundle.models[config.precision].sha256, files)

    def close(self) -> None:
        """Let go of all models."""
        self._at = {}


def _try(runtime: Runtime, bundle: Bundle) -> None:
    """Raise UserError if a model does not answer."""
    try:
        _, probabilities = runtime(np.zeros((2, runtime.size, runtime.size, 3), np.uint8))
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise UserError(f"{str(bundle.folder)!r} does not answer: {error}") from error
    if probabilities.shape != (2, len(bundle.card.classes)) or not np.isfinite(probabilities).all():
        raise UserError(f"{str(bundle.folder)!r} gives no probabilities of its {len(bundle.card.classes)} classes")


def _close(engines: list[Engine], files: list[int]) -> None:
    for engine in engines:
        engine.close()
    for file in files:
        os.close(file)


def _state(path: Path) -> _State | None:
    """Changes when a file of the folder does, so that a bundle seen half copied is looked at again; None without a manifest."""
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        stats = {entry.name: entry.stat() for entry in entries}
        if MANIFEST in stats:
            return tuple((name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in sorted(stats.items()))
    return None
