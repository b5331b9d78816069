"""The service as a Ray Serve application: `serve run serve/config.yaml`, or `serve deploy` of the same.

A new version in a bundle's place is taken up by each replica without a restart. Other arguments, deployed again, replace the
replicas one after another, each when its successor answers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from pipelines.common.errors import UserError
from serve.app import App
from serve.settings import ReplicaConfig, check

log = logging.getLogger("ray.serve")
GRACE = 30  # seconds that a replica has to answer what it has taken in


@serve.deployment(name="Models")
@serve.ingress()
class Service:
    """One replica: all models of the service."""

    def __init__(self, settings: dict[str, Any], local: bool) -> None:
        """local: all replicas are on this machine, and nothing else shall reach them."""
        if local:
            _listen_on_loopback()
        self._app = App(ReplicaConfig.model_validate(settings), names_requests=False)  # Ray Serve does
        self._started = False

    def __serve_build_asgi_app__(self) -> App:
        return self._app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called before the first request, and again where the configuration changes. What does not load changes nothing."""
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
        """Ray Serve replaces a replica for which this raises."""
        if self._started and not self._app.store.healthy:
            raise RuntimeError("a model's thread has ended")

    async def __del__(self) -> None:
        await self._app.stop()


def _listen_on_loopback() -> None:
    """Replicas listen for each other on every interface, and for HAProxy where that listens; Ray Serve has no setting for
    it."""
    from ray.serve._private import replica

    add, start = replica.add_port_to_grpc_server, replica.start_asgi_http_server
    replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))
    replica.start_asgi_http_server = lambda app, options, **more: start(
        app, options.model_copy(update={"host": "127.0.0.1"}), **more
    )


def build(args: dict[str, Any]) -> Application:
    """The application of a configuration's `args`. Raises UserError."""
    return application(args, None)


def application(args: dict[str, Any], metrics: Path | None) -> Application:
    """The same where all replicas are on this machine, and add their metrics up in a folder. Raises UserError."""
    config = check(args)
    most = config.max_replicas
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if most is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas,
                max_replicas=max(most, config.replicas),
                target_ongoing_requests=config.max_batch,
                upscale_delay_s=5,
                downscale_delay_s=60,
            )
        }
    return Service.options(  # type: ignore[attr-defined]  # the decorators make a deployment of it
        **scaling,
        # The application counts for itself, and answers 503 in its own shape.
        max_ongoing_requests=config.max_queue + 64,
        max_queued_requests=-1,
        ray_actor_options={
            "num_cpus": config.threads or 1,
            "runtime_env": {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(metrics)} if metrics else {}},
        },
        graceful_shutdown_timeout_s=GRACE,
        health_check_period_s=5,
        user_config={"bundles": [str(path) for path in config.bundles]},
    ).bind(config.model_dump(mode="json", include=set(ReplicaConfig.model_fields)), local=metrics is not None)
