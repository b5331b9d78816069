"""What the requests that wait for a model take up, and how much of it there may be."""

from __future__ import annotations

from serve.errors import overloaded
from serve.metrics import Metrics
from serve.settings import ReplicaConfig


class Load:
    """The requests of one replica.

    Attributes:
        waiting: Requests that wait for an answer of a model.
        held: Bytes of their bodies, and of the images decoded from them.
    """

    def __init__(self, config: ReplicaConfig, metrics: Metrics) -> None:
        """Start with no request.

        Args:
            config: `max_queue` and `max_held_bytes` count.
            metrics: Told how many requests wait.
        """
        self.waiting = self.held = 0
        self.config, self._metrics = config, metrics

    def turn(self) -> Turn:
        """Give a request a place, to be used with `with`.

        Returns:
            The place.

        Raises:
            ProblemError: Status 503: as many requests wait as may.
        """
        if self.waiting >= self.config.max_queue:
            raise overloaded(f"{self.waiting} requests are waiting; try again")
        return Turn(self)

    def count(self, change: int) -> None:
        """Count requests that wait.

        Args:
            change: How many more.
        """
        self.waiting += change
        self._metrics.waiting(self.waiting)


class Turn:
    """A request's place, and the bytes that it holds. Both are given back however the request ends."""

    def __init__(self, load: Load) -> None:
        """Prepare a place; `with` takes it.

        Args:
            load: All requests of the replica.
        """
        self._load = load
        self._own = 0

    def __enter__(self) -> Turn:
        self._load.count(1)
        return self

    def hold(self, more: int) -> None:
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
        self._load.count(-1)
        self._load.held -= self._own
