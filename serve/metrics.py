"""What Prometheus scrapes: requests, latency, batches, queue, answers of each class.

Replicas of one machine share a folder (PROMETHEUS_MULTIPROC_DIR), so that whichever is asked tells of all.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one replica."""

    def __init__(self) -> None:
        """Make them; in `PROMETHEUS_MULTIPROC_DIR`, if that is set."""
        shared = bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        self._registry = CollectorRegistry()
        self._requests = Counter("cibl_ray_requests", "Requests answered", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "cibl_ray_request_seconds",
            "From the request's head to its answer",
            ["route"],
            buckets=_LATENCY,
            registry=self._registry,
        )
        self._batches = Histogram(
            "cibl_ray_batch_images", "Images of each call of onnxruntime", ["model"], buckets=_BATCH, registry=self._registry
        )
        self._waiting = Gauge(
            "cibl_ray_waiting_requests",
            "Requests that wait for an answer",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._answers = Counter(
            "cibl_ray_answers", "Most likely class of each image", ["model", "label"], registry=self._registry
        )
        self._failed = Counter(
            "cibl_ray_failed_updates", "New versions and replicas that did not load", registry=self._registry
        )
        self._shared = shared
        self._of_class: dict[tuple[str, str], Counter] = {}
        self._of_batch: dict[str, Histogram] = {}
        self._of_route: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def failed_update(self) -> None:
        """Count a bundle that did not load."""
        self._failed.inc()

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer and its time.

        Args:
            route: The route's name.
            status: Of HTTP.
            seconds: The request took.
        """
        known = self._of_route.get((route, status))
        if known is None:
            known = self._of_route[route, status] = self._requests.labels(route, str(status)), self._seconds.labels(route)
        known[0].inc()
        known[1].observe(seconds)

    def batch(self, model: str, images: int) -> None:
        """Count a call of onnxruntime.

        Args:
            model: The model's name.
            images: Images of the call.
        """
        known = self._of_batch.get(model)
        if known is None:
            known = self._of_batch[model] = self._batches.labels(model)
        known.observe(images)

    def answer(self, model: str, label: str) -> None:
        """Count the most likely class of an image.

        Args:
            model: The model's name.
            label: The class.
        """
        known = self._of_class.get((model, label))
        if known is None:
            known = self._of_class[model, label] = self._answers.labels(model, label)
        known.inc()

    def waiting(self, requests: int) -> None:
        """Set how many requests wait.

        Args:
            requests: Their number.
        """
        self._waiting.set(requests)

    def text(self) -> bytes:
        """The exposition format, of all replicas that share the folder."""
        if not self._shared:
            return generate_latest(self._registry)
        for path in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("gauge_live*_*.db"):
            process = path.stem.rpartition("_")[2]
            if not Path(f"/proc/{process}").exists():  # killed: nothing waits in it any more
                with contextlib.suppress(FileNotFoundError):  # another replica, asked at the same time, has removed it
                    multiprocess.mark_process_dead(int(process))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)
