"""What Ray reads from the environment when it is imported: settle it before that."""

from __future__ import annotations

import os

_OWN = "CIBL_RAY_OWN_CLUSTER"  # the cluster's processes inherit it


def own_cluster() -> bool:
    """Whether the cluster is this machine's own, started for the command that this process belongs to."""
    return os.environ.get(_OWN) == "1"


def settle(own: bool) -> None:
    """own: a cluster of this machine alone will be started, and all its services shall listen on loopback.

    (The variable's name tells where Ray does so by itself; it works on Linux too.) Every cluster asks for a token.
    """
    os.environ[_OWN] = "1" if own else "0"
    if own:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # What workers send each other: torch would take the interface that the machine's name leads to.
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        # These want a controller that is an actor.
        os.environ["RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"] = os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "0"
        # Every idle process of Ray wakes a hundred times a second, and a machine of its own shares its cores with training.
        for needless in (
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
            "RAY_TRAIN_METRICS_ENABLED",
            "RAY_enable_metrics_collection",  # Ray's own; nobody fetches them from a cluster that lives as long as its command
            "RAY_event_stats",  # times of its own event loops
            "RAY_task_events_report_interval_ms",  # 0: never
            "RAY_enable_worker_prestart",
            "RAY_prestart_worker_first_driver",
        ):
            os.environ.setdefault(needless, "0")
        for often in (  # and what is left, once a second instead of four to ten times
            "RAY_kill_idle_workers_interval_ms",
            "RAY_local_fs_monitor_interval_ms",
            "RAY_memory_monitor_refresh_ms",
            "RAY_object_manager_timer_freq_ms",
            "RAY_raylet_check_gc_period_milliseconds",
        ):
            os.environ.setdefault(often, "1000")
        os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
        # Training runs in a thread there, whose own heaps the C library would give back to the kernel in every step.
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial may end before its first score
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Ray Tune's boxes and tables; we show the sweep ourselves
