"""One model at work. All requests that wait go through onnxruntime in one call, and nobody waits for a batch to fill.

The model runs in a thread of its own. Batches grow with the load by themselves: while one runs, the next gathers. On a CPU a
longer batch is no more efficient, so a batch ends after as many images as run in a few milliseconds.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cibl_ray.bundle.card import EMBEDDING, LOGITS, PROBABILITIES
from cibl_ray.bundle.runtime import Runtime

Result = dict[str, np.ndarray]
_CPU = "CPUExecutionProvider"
_RUN_SECONDS = 0.003  # of one batch on a CPU, if that is at least
_LEAST = 4  # images, below which a batch would cost more a piece


@dataclass(eq=False)
class Spent:
    """Seconds of work on a request. What it waits for other requests is left out.

    Attributes:
        decode: From file to pixels, of each image.
        model: The call of onnxruntime that it shares with the requests of its batch.
    """

    decode: list[float] = field(default_factory=list)
    model: float = 0.0

    def header(self) -> bytes:
        """As the value of `Server-Timing`, in milliseconds."""
        return f"decode;dur={1000 * sum(self.decode):.2f}, model;dur={1000 * self.model:.2f}".encode()


@dataclass(eq=False)
class _Job:
    images: np.ndarray  # uint8 (n, S, S, 3)
    shift: np.ndarray | None  # float32 (n,)
    embedding: bool
    done: asyncio.Future[Result]
    spent: Spent


class Engine:
    """Runs a model for the requests of one event loop.

    Attributes:
        batches: Calls of onnxruntime.
        nanoseconds: That they have taken.
    """

    def __init__(self, runtime: Runtime, max_batch: int, observe: Callable[[int], None] = lambda images: None) -> None:
        """Start the thread.

        Args:
            runtime: The model.
            max_batch: Images of one call.
            observe: Called in the thread with the number of images of each call.
        """
        self.batches = self.nanoseconds = 0
        self.runtime = runtime
        self._max_batch, self._observe = max_batch, observe
        self._on_cpu = runtime.provider == _CPU
        self._image_seconds: float | None = None  # that an image takes, lately
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, images: np.ndarray, shift: np.ndarray | None = None, embedding: bool = False, spent: Spent | None = None
    ) -> asyncio.Future[Result]:
        """Run the model soon.

        Args:
            images: uint8 (n, S, S, 3), n >= 1.
            shift: float32 (n,), or None for 0.
            embedding: Whether it is wanted.
            spent: Gets the time of the call, before the future has its result.

        Returns:
            A future of output name -> float32 (n, width).
        """
        done: asyncio.Future[Result] = self._loop.create_future()
        self._jobs.put(_Job(images, shift, embedding, done, spent or Spent()))
        return done

    @property
    def alive(self) -> bool:
        """Whether the thread is."""
        return self._thread.is_alive()

    @property
    def limit(self) -> int:
        """Images after which a batch takes no more requests."""
        if self._image_seconds is None or not self._on_cpu:
            return self._max_batch
        return min(self._max_batch, max(_LEAST, int(_RUN_SECONDS / self._image_seconds)))

    def close(self) -> None:
        """End after all that was submitted before."""
        self._jobs.put(None)

    def _work(self) -> None:
        ended = False
        while not ended:
            job = self._jobs.get()
            jobs: list[_Job] = []
            while job is not None:
                if not job.done.cancelled():  # its client has gone
                    jobs.append(job)
                if sum(len(waiting.images) for waiting in jobs) >= self.limit:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            ended = job is None
            if jobs:
                self._run(jobs)

    def _run(self, jobs: list[_Job]) -> None:
        answers: list[Result | Exception]
        try:
            answers = [*self._answers(jobs)]
        except Exception as error:  # raised in each request
            answers = [error] * len(jobs)
        self._loop.call_soon_threadsafe(_resolve, jobs, answers)

    def _answers(self, jobs: list[_Job]) -> list[Result]:
        names = (LOGITS, PROBABILITIES) + ((EMBEDDING,) if any(job.embedding for job in jobs) else ())
        images = jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
        shift = None
        if any(job.shift is not None for job in jobs):
            rows = [np.zeros(len(job.images), np.float32) if job.shift is None else job.shift for job in jobs]
            shift = np.concatenate(rows)
        parts = []
        for start in range(0, len(images), self._max_batch):
            rows_of = slice(start, start + self._max_batch)
            begun = time.perf_counter()
            parts.append(self.runtime(images[rows_of], None if shift is None else shift[rows_of], names))
            seconds = time.perf_counter() - begun
            self.batches += 1
            self.nanoseconds += int(1e9 * seconds)
            self._time(seconds / len(images[rows_of]), len(images[rows_of]))
            self._observe(len(images[rows_of]))
            for job in jobs:
                job.spent.model += seconds
        outputs = parts[0] if len(parts) == 1 else [np.concatenate(part) for part in zip(*parts, strict=True)]
        ends = np.cumsum([len(job.images) for job in jobs])
        return [
            {name: output[end - len(job.images) : end] for name, output in zip(names, outputs, strict=True)}
            for job, end in zip(jobs, ends, strict=True)
        ]

    def _time(self, seconds: float, images: int) -> None:
        """Remember what an image takes. A small batch is left out: it measures the call more than the images."""
        if images >= _LEAST or self._image_seconds is None:
            before = seconds if self._image_seconds is None else self._image_seconds
            self._image_seconds = 0.9 * before + 0.1 * seconds


def _resolve(jobs: list[_Job], answers: list[Result | Exception]) -> None:
    for job, answer in zip(jobs, answers, strict=True):
        if job.done.done():
            continue
        if isinstance(answer, Exception):
            job.done.set_exception(answer)
        else:
            job.done.set_result(answer)
