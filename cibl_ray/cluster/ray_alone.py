"""Ray Train's controller in the driver's own process, for a fixed number of workers on a cluster of this machine's own.

An actor is a process that wakes a hundred times a second, on the cores that train. On a cluster that has other nodes the
controller stays one, of which Ray knows when it is gone; here the cluster ends with the driver anyway. Only for the version of
Ray whose insides this is written for (`ray_trainer.known`).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from contextlib import suppress
from typing import Any

import ray
from ray.train import Result
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup


def train_here(scaling_config: Any, **given: Any) -> Result:
    """Run the controller until the training ends. Ctrl-C stops the workers and raises KeyboardInterrupt."""
    given["scaling_policy"] = _NoAutoscaler(scaling_config)
    controller = _Controller(**given)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # it tells here what an actor tells its log file
    if threading.current_thread() is threading.main_thread():
        # At once, where asyncio's own handler waits for the controller's next pause; also where the shell had it ignored.
        signal.signal(signal.SIGINT, lambda number, frame: signal.default_int_handler(number, frame))
    try:
        asyncio.run(controller.run())
    except KeyboardInterrupt:
        if (group := controller.get_worker_group()) is not None and group.has_started():
            with suppress(Exception):  # of a cluster that ends at the same time
                group.abort()
        raise
    return controller.get_result()


class _NoAutoscaler(FixedScalingPolicy):
    """Workers on a cluster that does not grow: no actor that would pass on what they need."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class _Group(WorkerGroup):
    """Workers that agree with each other through torch, not through an actor of Ray's, and whose controller is no actor."""

    def _start(self) -> None:
        try:
            super()._start()
        except BaseException:
            if self._worker_group_state is not None:  # a worker was lost while they joined each other; the next need the place
                self._worker_group_state.shutdown()
                self._clear_state()
            raise

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
