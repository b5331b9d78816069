"""The service as a Ray Serve application: `serve run serve/config.yaml`, or `serve deploy` of the same.

A new version in a bundle's place is loaded by each replica without a restart. Other settings, deployed again, replace the
replicas one after another, each when its successor answers.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from pipelines.common.errors import UserError
from pipelines.common.files import write_atomically
from serve.settings import COMMAND_ONLY, ReplicaConfig, ServiceConfig, check

if TYPE_CHECKING:
    from serve.server import Server

log = logging.getLogger("ray.serve")
GRACE = 30  # seconds that a replica has to answer what it has taken in
_KNOWN_RAY = ("2.59", "2.60")  # releases whose replicas open their internal port as `_keep_on_loopback` expects
_WAITING = "waiting"


@serve.deployment(name="Models")
@serve.ingress()
class Service:
    """One replica behind Ray Serve's own proxy: all models of the service."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Make the application, without models.

        Args:
            settings: Field names of `ReplicaConfig` with their values.
        """
        from serve.app import App

        self._app = App(ReplicaConfig.model_validate(settings), names_requests=False)  # Ray Serve does
        self._started = False

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the bundles. Ray Serve calls it before the first request, and again when the configuration changes.

        Args:
            user_config: Under `bundles`, the folders. If they do not load the second time, nothing changes.
        """
        bundles = tuple(Path(path) for path in user_config["bundles"])
        if not self._started:
            await self._app.start(bundles)
            self._started = True
            return
        try:
            await self._app.store.set(bundles)
        except UserError as error:
            log.error("the new configuration is not used: %s", error)

    def check_health(self) -> None:
        """Tell Ray Serve whether this replica still works. It replaces a replica for which this raises.

        Raises:
            RuntimeError: A model's thread has ended.
        """
        if self._started and not self._app.store.healthy:
            raise RuntimeError("a model's thread has ended")

    async def __del__(self) -> None:
        await self._app.stop()


@serve.deployment(name="Models")
class Local:
    """One replica of `python -m serve`, on a Unix socket in the service's private folder, behind HAProxy.

    Ray Serve starts it, looks after its health and scales it. Requests do not pass through Ray.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve calls it in its event loop
        self, settings: dict[str, Any], folder: str, slots: int
    ) -> None:
        """Prepare a replica. `reconfigure` starts it.

        Args:
            settings: Field names of `ReplicaConfig` with their values.
            folder: Private to the service: sockets, metrics, messages.
            slots: How many sockets HAProxy knows.
        """
        self._folder, self._slots = Path(folder), slots
        self._server: Server | None = None
        self._settings = settings
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self._folder / "metrics")  # read when the client library is imported
        if settings["private_ports"]:
            _keep_on_loopback(self._folder)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the bundles. Ray Serve calls it before the first request, and again when the bundles change.

        Args:
            user_config: Under `bundles`, the folders. If they do not load the second time, nothing changes.
        """
        bundles = tuple(Path(path) for path in user_config["bundles"])
        try:
            if self._server is None:
                self._start(bundles)
            else:
                self._server.set(bundles)
        except (UserError, OSError) as error:
            tell(self._folder, str(error))
            if self._server is None:
                raise
            log.error("the new configuration is not used: %s", error)

    def _start(self, bundles: tuple[Path, ...]) -> None:
        from serve.server import Server

        self._slot, listener = _listen(self._folder, self._slots)
        server = Server(ReplicaConfig.model_validate(self._settings), listener)
        try:
            server.load(bundles)
        except BaseException:
            server.stop(0)
            raise
        self._server = server

    def check_health(self) -> None:
        """Tell Ray Serve whether this replica still works. It replaces a replica for which this raises.

        Raises:
            RuntimeError: A model's thread has ended.
        """
        if self._server is not None and not self._server.healthy:
            raise RuntimeError("a model's thread has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `by_waiting` decides by."""
        return {_WAITING: self._server.app.load.waiting if self._server is not None else 0}

    def __del__(self) -> None:
        if self._server is not None:
            self._server.stop(GRACE - 5)


def tell(folder: Path, text: str) -> None:
    """Leave a message for the command that started the service. It prints the message on its standard error.

    Args:
        folder: Private to the service.
        text: The message.
    """
    write_atomically(folder / f"message-{os.getpid()}", json.dumps(" ".join(text.split())))


def _listen(folder: Path, slots: int) -> tuple[Any, socket.socket]:
    """Take a free slot among those that HAProxy knows: its lock, which ends with this process, and its socket."""
    from serve.haproxy import socket_of

    for slot in range(slots):
        lock = (folder / f"replica-{slot}.lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        path = socket_of(folder, slot)
        path.unlink(missing_ok=True)  # of a replica that was killed
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        return lock, listener
    raise UserError(f"all {slots} places for replicas are taken")


def _keep_on_loopback(folder: Path) -> None:
    """Replicas open a port for calls among deployments, on every interface, and Ray Serve has no setting for that.

    This service makes no such calls. gRPC's own method is wrapped in this process, so that a wildcard address means loopback.
    With an unknown release of Ray the port is opened as that release does it, and the command warns.
    """
    if not ray.__version__.startswith(tuple(f"{known}." for known in _KNOWN_RAY)):
        tell(
            folder,
            f"warning: ray {ray.__version__} is not known here: its replicas may listen on every interface, for callers that "
            f"have the cluster's token. Known: {', '.join(_KNOWN_RAY)}",
        )
        return
    import grpc.aio  # type: ignore[import-untyped]

    kind = type(grpc.aio.server())
    add = kind.add_insecure_port
    if getattr(add, "loopback", False):
        return

    def add_on_loopback(server: Any, address: str) -> int:
        return int(add(server, address.replace("[::]:", "127.0.0.1:").replace("0.0.0.0:", "127.0.0.1:")))

    add_on_loopback.loopback = True  # type: ignore[attr-defined]
    kind.add_insecure_port = add_on_loopback


def by_waiting(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Decide the number of replicas, as Ray Serve's policy for `--replicas MIN-MAX`.

    Args:
        context: What Ray Serve knows, with what `Local.record_autoscaling_stats` has returned.

    Returns:
        As many replicas as the requests that wait need, and no state.
    """
    waiting = (context.aggregated_metrics or {}).get(_WAITING, {})
    if not waiting:
        return context.target_num_replicas, {}
    assert context.config is not None
    return sum(waiting.values()) / context.config.target_ongoing_requests, {}


def build(args: dict[str, Any]) -> Application:
    """Build the application of a cluster's configuration.

    Args:
        args: Field names of `ServiceConfig` with their values.

    Returns:
        The application.

    Raises:
        UserError: A setting is wrong, or one that `python -m serve` alone applies.
    """
    if found := next((name for name in COMMAND_ONLY if name in args), None):
        raise UserError(f"{found}: serve deploy does not apply it; set it in the proxy in front, or use python -m serve")
    config = check(args)
    return Service.options(  # type: ignore[attr-defined]  # the decorators make a deployment of it
        **_options(config, {}),
        # The application counts for itself, and answers 503 in its own shape. Bodies on their way count here alone.
        max_ongoing_requests=config.max_queue + config.max_connections,
        max_queued_requests=-1,
    ).bind(_settings(config))


def local_application(args: dict[str, Any], folder: Path) -> Application:
    """Build the application of `python -m serve`.

    Args:
        args: Field names of `ServiceConfig` with their values.
        folder: Private to the service: sockets, metrics, messages.

    Returns:
        The application.

    Raises:
        UserError: A setting is wrong.
    """
    from serve.haproxy import slots

    config = check(args)
    policy = AutoscalingPolicy(policy_function="serve.deployment:by_waiting")
    return Local.options(  # type: ignore[attr-defined]
        **_options(config, {"policy": policy, "metrics_interval_s": 1, "look_back_period_s": 5}),
    ).bind(_settings(config), str(folder), slots(config))


def _settings(config: ServiceConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(ReplicaConfig.model_fields))


def _options(config: ServiceConfig, scaling: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": config.threads or 1},
        "graceful_shutdown_timeout_s": GRACE,
        "health_check_period_s": 2,
        "user_config": {"bundles": [str(path) for path in config.bundles]},
    }
    if config.max_replicas is None:
        return {**options, "num_replicas": config.replicas}
    return {
        **options,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=max(config.max_replicas, config.replicas),
            target_ongoing_requests=config.max_batch,
            upscale_delay_s=5,
            downscale_delay_s=60,
            **scaling,
        ),
    }
