"""Less of Ray on a cluster of this machine's own, whose cores train: its idle processes wake up to a hundred times a second.

Ray Train's controller runs in the driver's own process. On a cluster that has other nodes it stays an actor, of which Ray knows
when it is gone; here the cluster ends with the driver anyway. Written for the insides of one version of Ray (`known`); another
runs as it does by itself, a little slower.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from typing import Any

import ray
from ray.train import Result
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup


def known() -> bool:
    """Whether this is the Ray whose insides are known here."""
    return ray.__version__.startswith("2.60.")


def end_needless() -> None:
    """End those services of the cluster just started here that nobody asks for anything: the log reader, whose lines no driver
    shows; the autoscaler; and the dashboard's server, which runs, closed, even where none was asked for."""
    node: Any = ray._private.worker._global_node
    node.kill_log_monitor(check_alive=False)
    node.kill_monitor(check_alive=False)
    node.kill_dashboard(check_alive=False)


def train_here(scaling_config: Any, **given: Any) -> Result:
    """Run the controller until the training ends. Ctrl-C stops the workers and raises KeyboardInterrupt."""
    given["scaling_policy"] = _NoAutoscaler(scaling_config)
    controller = _Controller(**given)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what went wrong is in the result
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell had it ignored
    try:
        asyncio.run(controller.run())
    except KeyboardInterrupt:
        if (group := controller.get_worker_group()) is not None and group.has_started():
            group.abort()
        raise
    return controller.get_result()


class _NoAutoscaler(FixedScalingPolicy):
    """Workers on a cluster that does not grow: no actor that would pass on what they need."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class _Group(WorkerGroup):
    """Workers that agree with each other through torch, not through an actor of Ray's, and whose controller is no actor."""

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, Any]) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=None,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[number] for name, values in train_context_args.items()},
                )
                for number, worker in enumerate(workers)
            ]
        )
        ray.kill(sync_actor)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Group
