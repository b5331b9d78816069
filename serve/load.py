"""What the requests of a replica take up, and how much of it there may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve.errors import overloaded
from serve.metrics import Metrics
from serve.settings import ReplicaConfig


class Load:
    """The requests of one replica.

    Attributes:
        open: Requests whose body is read, or that are answered.
        waiting: Those whose body has arrived: they wait for an answer of a model.
        held: Bytes of bodies, of the images decoded from them, and of answers until they are sent.
    """

    def __init__(self, config: ReplicaConfig, metrics: Metrics) -> None:
        """Start with no request.

        Args:
            config: `max_queue` and `max_held_bytes` count.
            metrics: Told how many requests wait.
        """
        self.open = self.waiting = self.held = 0
        self.config, self._metrics = config, metrics

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Give a request a place in the queue, until the end of the block.

        Take it when the body has arrived: a client that is slow to send its body must take no place from others.

        Raises:
            ProblemError: Status 503: as many requests wait as may.
        """
        if self.waiting >= self.config.max_queue:
            raise overloaded(f"{self.waiting} requests are waiting; try again")
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self.waiting += change
        self._metrics.waiting(self.waiting)


class Held:
    """The bytes that a request holds, from its body to its answer. All are given back at the end of the `with` block."""

    def __init__(self, load: Load) -> None:
        """Prepare; `with` begins.

        Args:
            load: All requests of the replica.
        """
        self._load = load
        self._own = 0

    def __enter__(self) -> Held:
        self._load.open += 1
        return self

    def __call__(self, more: int) -> None:
        """Count bytes that the request holds from now on. A request that is alone is never refused.

        Args:
            more: Bytes.

        Raises:
            ProblemError: Status 503: all requests together would hold more than `max_held_bytes`.
        """
        load = self._load
        if load.held > self._own and load.held + more > load.config.max_held_bytes:
            raise overloaded(f"requests of {load.held:,} bytes are waiting; try again", ((b"connection", b"close"),))
        load.held += more
        self._own += more

    def __exit__(self, *error: object) -> None:
        self._load.open -= 1
        self._load.held -= self._own
