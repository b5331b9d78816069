"""`python -m serve.cluster FOLDER PIPE`: a Ray cluster of this machine alone, with the replicas of one service.

`serve.local` starts it as a child, in a session of its own. Each line of its standard input is a JSON object of settings to
deploy, each line that it writes to PIPE is the result. It ends when its standard input does.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

APPLICATION = "models"
_PATIENCE = 2  # seconds for Ray to end by itself

# What Ray reads from the environment when it is imported.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to Ray's makers
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # this machine alone: all of Ray's services listen on loopback
    "RAY_enable_metrics_collection": "0",  # Ray's own metrics; the application has its own
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",  # never
    "RAY_prestart_worker_first_driver": "0",
    "RAY_kill_idle_workers_interval_ms": "1000",  # instead of several times a second
    "RAY_local_fs_monitor_interval_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # ours is in front
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
    # The controller looks at the replicas four times a second instead of ten: HAProxy passes over a lost one by itself.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "0",  # Ray Serve's own metrics are not collected
}


def main() -> None:
    """Start Ray, then deploy what is asked for until the end of the standard input."""
    folder, pipe = Path(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w", buffering=1)
    cpus = json.loads(sys.stdin.readline())
    os.environ.update(_ENVIRONMENT)
    token = folder / "token"
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.pop("RAY_ADDRESS", None)

    import ray
    from ray import serve

    from serve.deployment import local_application

    # Its files are in the service's private folder: nothing in the home folder, nothing that others can read.
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        num_cpus=cpus,
        _temp_dir=str(folder / "ray"),
    )
    serve.start(proxy_location="Disabled")
    orders: list[dict[str, Any]] = []
    arrived = threading.Condition()

    def read() -> None:
        for line in sys.stdin:
            with arrived:
                orders.append(json.loads(line))
                arrived.notify()
        stop = threading.Timer(_PATIENCE, os._exit, [1])
        stop.daemon = True
        stop.start()
        ray.shutdown()
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        with arrived:
            arrived.wait_for(lambda: orders)
            order = orders.pop(0)
        try:
            serve.run(local_application(order, folder), name=APPLICATION, route_prefix=None)
            answer: dict[str, Any] = {"ok": True}
        except Exception as error:  # whatever Ray says; replicas tell their own reasons in files
            answer = {"ok": False, "error": " ".join(str(error).split())}
        print(json.dumps(answer), file=pipe, flush=True)


if __name__ == "__main__":
    main()
