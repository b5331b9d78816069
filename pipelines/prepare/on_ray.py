"""Preparing on a Ray cluster: tasks read, decode and encode the images; this process writes the files.

The images come back in their order, so every file is the one that a single process writes, byte for byte. Ray starts the task
of a lost node again on another. If that fails too often, or this process is stopped, finished files are kept as always.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pipelines
from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.config import DataConfig
from pipelines.library_warnings import collected_warnings
from pipelines.prepare.sources import Images
from pipelines.prepare.sources.addresses import NetworkError
from pipelines.prepare.writer import Result, pack_one

if TYPE_CHECKING:
    import ray

_AT_ONCE = 128  # images of a task at most: a second or so of work, for which Ray takes ten milliseconds
_PIXELS = 32 << 20  # bytes of a task's images at most, where they come back as pixels
_SIDE = 512  # pixels of an image's side, where the configuration sets no limit
_TURNS = 4  # tasks for each worker at least, of a small split
_AHEAD = 3  # tasks for each worker that are begun before their turn
_RETRIES = 3  # of a task whose node or process is lost


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Start a Ray cluster on this machine, or join one, until the end of the block.

    A cluster of this machine's own listens on loopback alone and asks for a token. Within a cluster that this process has
    joined already, nothing is started.

    Args:
        address: HOST:PORT of a cluster to join, or 'auto'; None starts one.

    Raises:
        UserError: The package ray is not installed, or the cluster does not start or answer.
    """
    if address is None and "ray" not in sys.modules:  # Ray reads it when it is imported
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for name in ("RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            os.environ.pop(name, None)
    try:
        import ray
    except ImportError as error:
        raise UserError("--cluster needs the package ray: pip install 'cibl-ray[cluster]'") from error
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))} if address is None else {}
    code = {"py_modules": [str(Path(pipelines.__file__ or "").parent)]}
    try:
        ray.init(address=address or "local", runtime_env=None if address is None else code, **own, **quiet)
    except Exception as error:  # Ray raises whatever it met
        ray.shutdown()
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--cluster: Ray does not start or answer at {address or 'this machine'}: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


class RayPacker:
    """Packs images by tasks of the cluster, as `pack_all` does by threads.

    Args:
        workers: Tasks at once; None: as many as the cluster has CPUs.
    """

    def __init__(self, workers: int | None = None) -> None:
        import ray

        self._workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def __call__(
        self, images: Images, order: np.ndarray, data: DataConfig, seed: int, lossless: bool
    ) -> Generator[tuple[int, Result], None, None]:
        """As `pack_all`.

        Raises:
            UserError: A node does not see the images' files.
            NetworkError: A task was lost more often than it is tried again.
        """
        import ray

        raw = stream(seed, "raw").random(len(images)) < data.store.raw_share  # of mode 'mixed'
        mark = _first_file(images)
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD", max_retries=_RETRIES)(_packed)
        settings = ray.put(data)
        side = data.store.max_side or _SIDE
        size = max(1, min(_AT_ONCE, _PIXELS // (3 * side**2), -(-len(order) // (_TURNS * self._workers))))
        chunks = (order[begin : begin + size] for begin in range(0, len(order), size))
        pending: list[tuple[np.ndarray, ray.ObjectRef[Any]]] = []
        warned: set[str] = set()

        def submit() -> None:
            rows = next(chunks, None)
            if rows is not None:
                pending.append((rows, task.remote(images.take(rows), raw[rows], settings, lossless, mark)))

        for _ in range(self._workers * _AHEAD):
            submit()
        try:
            while pending:
                rows, answer = pending.pop(0)
                try:
                    results, warning = ray.get(answer)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from error
                    raise
                except ray.exceptions.RayError as error:
                    reason = " ".join(str(error).split())[:300]
                    raise NetworkError(f"--cluster: a task was lost for good: {reason}") from error
                if warning:
                    warned.add(warning)
                submit()
                yield from zip(rows.tolist(), results, strict=True)
        finally:
            for _, answer in pending:
                ray.cancel(answer)
        for warning in sorted(warned):
            print(f"data: {warning}", file=sys.stderr)


def _packed(images: Images, raw: np.ndarray, data: DataConfig, lossless: bool, mark: str | None) -> tuple[list[Result], str]:
    """Some images packed, in a task; and what the decoders warned of."""
    if mark is not None and not Path(mark).exists():
        raise UserError(
            f"--cluster: node {os.uname().nodename} does not see {mark!r}; the images must lie in a folder that all nodes see, "
            "or behind addresses"
        )
    with collected_warnings() as warned:
        results = [pack_one(images, index, bool(raw[index]), data, lossless, warned) for index in range(len(images))]
    return results, warned.text()


def _first_file(images: Images) -> str | None:
    """A file that a node must see to read these images; None where there is none, or it is not here either."""
    files = images.files if images.files is not None else getattr(images.content, "files", [])
    return next((str(file) for file in files[:1000] if Path(file).exists()), None)
