"""The environment variables that Ray reads when it is imported. Set them before that."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_TOKEN = secrets.token_hex(32)  # of the clusters that this process starts
HEALTH_CHECK = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
_TRACKERS_PLACES = ("MLFLOW_TRACKING_URI", "WANDB_DIR")  # Ray's processes work in folders of their own
_OWN = "CIBL_RAY_OWN_CLUSTER"  # inherited by the cluster's processes


def _absolute(place: str) -> str:
    """A tracker's path, or database in a file, as an absolute one. Any other place as it is."""
    scheme, separator, path = place.partition(":///")
    if scheme == "sqlite" and separator:
        return f"sqlite:///{Path(path).absolute()}"
    return place if ":" in place or place in ("", "databricks", "databricks-uc") else str(Path(place).absolute())


def is_own_cluster() -> bool:
    """Whether this process belongs to a cluster that a command started for itself on this machine."""
    return os.environ.get(_OWN) == "1"


def configure_ray_env(own: bool) -> None:
    """Set what Ray reads from the environment. Call it before Ray is imported.

    Every cluster asks for a token. A cluster of the command's own gets its own token, listens on loopback alone, reports no
    usage statistics, and does not inherit the address of another cluster.

    Args:
        own: Whether the command starts a cluster of its own on this machine, instead of joining one.
    """
    os.environ[_OWN] = "1" if own else "0"
    os.environ["RAY_AUTH_MODE"] = "token" if own else os.environ.get("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial may end before its first score
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Ray Tune's tables; the sweep prints its own lines
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    for name in _TRACKERS_PLACES:
        if name in os.environ:
            os.environ[name] = _absolute(os.environ[name])
    if not own:
        # Of a worker's host that does not answer. Ray Train waits ten minutes by default.
        os.environ.setdefault(HEALTH_CHECK, "45")
        return
    # In the environment, so that Ray writes no token file into the home folder.
    os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    # Ray Train's cleaner of placement groups asks a dashboard whether the run lives. This cluster has none, and without an
    # address the cleaner would ask any other cluster on the machine, which says no.
    os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"
    # Ray listens on 127.0.0.1 alone where this is 0: on Windows and macOS by default, on Linux where it is set.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # The sockets of workers: torch would take the interface that the machine's name resolves to.
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")  # nobody reads them from a cluster of one run
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process, for nodes that a scheduler takes away
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # workers train in a thread, whose own heap glibc would trim in every step
