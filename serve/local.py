"""A Ray cluster of this machine alone, with the service in it and HAProxy in front."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cibl_ray.cluster.environment import settle
from pipelines.common.errors import UserError
from serve import haproxy as front
from serve.settings import check

APPLICATION = "models"


@contextmanager
def running(args: dict[str, Any], host: str, port: int, cpus: int | None = None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Serve `args` (a `ServiceConfig`) until the end of the block, and then answer what was asked before. Yields a function
    that deploys other `args` in their place. cpus: that Ray may count on; None: as many as the replicas ask for.

    Must be entered before Ray is imported: what Ray Serve is told here, it reads then. Raises UserError.
    """
    # Readable by this user alone; with a short name: the path of a socket in it may have 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="cibl-", dir="/tmp"))  # unique, mode 700
    try:
        settle(own=True)
        front.settle(folder, host, port)
        (folder / "metrics").mkdir()
        # Replicas and HAProxy's script find this code wherever they start.
        top = str(Path(__file__).resolve().parent.parent)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [top, os.environ.get("PYTHONPATH")]))
        import ray
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.config import HTTPOptions

        from serve.deployment import application

        check(args)
        most = max(args.get("max_replicas") or 0, args.get("replicas", 1)) * (args.get("threads") or 1)
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            num_cpus=cpus or max(len(os.sched_getaffinity(0)), most) + 1,  # replicas share cores where there are more of them
        )
        try:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)

            def deploy(other: dict[str, Any]) -> None:
                serve.run(application(other, folder / "metrics"), name=APPLICATION, route_prefix="/")

            try:
                serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))  # HAProxy alone listens on `host`
                deploy(args)
            except (RuntimeError, TimeoutError, RayError) as error:  # of a replica, or of HAProxy, that did not start
                reason = front.complaint(folder, str(error)) or " ".join(str(error).split())[-400:]
                raise UserError(f"the service did not start: {reason}") from error
            yield deploy
            serve.delete(APPLICATION)  # replicas end after their last answer
        finally:
            serve.shutdown()
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
