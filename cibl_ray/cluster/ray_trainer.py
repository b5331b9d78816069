"""Ray Train's trainer with what our runs need of it, and no more."""

from __future__ import annotations

import logging
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

from cibl_ray.cluster.progress_socket import Address, Posted
from cibl_ray.cluster.ray_doze import Doze
from cibl_ray.world import PeerLostError
from pipelines.common.errors import UserError

log = logging.getLogger(__name__)


def known() -> bool:
    """Whether this is the version whose insides are known. Another runs as it does by itself, a little slower."""
    return ray.__version__.startswith("2.60.")


def end_needless() -> None:
    """End those services of the cluster just started here that nobody asks for anything: the log reader, whose lines no driver
    shows; the autoscaler; and the dashboard's server, which runs, closed, even where none was asked for."""
    node: Any = ray._private.worker._global_node
    node.kill_log_monitor(check_alive=False)
    node.kill_monitor(check_alive=False)
    node.kill_dashboard(check_alive=False)


class LeanTrainer(TorchTrainer):
    """Without actors that have nothing to do here: each would wake a hundred times a second, on the cores that train.

    alone: on a cluster of this machine's own, with a fixed number of workers.
    """

    alone = False

    def _create_default_callbacks(self) -> list[Any]:
        needless: tuple[type, ...] = (DatasetsCallback,)  # shares out Ray's own data sets, of which there are none
        if ray.get_runtime_context().get_actor_id() is None:
            # Frees the workers' place where their controller is lost. Where this process is the whole job it ends too, and Ray
            # then frees all; a trial of a sweep may be stopped while the job goes on.
            needless += (PlacementGroupCleanerCallback,)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # typed as the first version's
        kept = [callback for callback in callbacks if not isinstance(callback, needless)]
        if not known():
            return kept
        return [*(_Cleaner() if type(one) is PlacementGroupCleanerCallback else one for one in kept), Doze()]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if self.alone and known():
            from cibl_ray.cluster.ray_alone import train_here

            return train_here(self.scaling_config, **given)
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]  # likewise


class _Cleaner(PlacementGroupCleanerCallback):
    """Ray's, whose actor frees the workers' place where their controller is lost. It asks whether the controller lives by an
    interface that looks for any cluster on the machine, and where there are several gives up, or asks another: so it is told
    which is its own."""

    def after_controller_start(self, train_run_context: Any) -> None:
        context = ray.get_runtime_context()
        self._controller_actor_id = context.get_actor_id()
        try:
            cleaner: Any = (
                ray.remote(num_cpus=0)(PlacementGroupCleaner)
                .options(
                    lifetime="detached",
                    resources={HEAD_NODE_RESOURCE_NAME: 0.001},
                    scheduling_strategy="DEFAULT",  # not in the trial's own place
                    runtime_env={"env_vars": {"RAY_ADDRESS": context.gcs_address, "RAY_API_SERVER_ADDRESS": ""}},
                )
                .remote(self._controller_actor_id, self._check_interval_s, self._get_actor_timeout_s, self._stop_timeout)
            )
            self._cleaner = cleaner
            cleaner.start_monitoring.remote()
        except Exception as error:  # training is worth more than a place that stays taken if it is killed
            log.warning("should this run be killed, its place stays taken until the cluster ends: %s", error)


@dataclass
class OneMachineConfig(TorchConfig):
    """Workers of one machine join each other by a file in `folder`: torch's TCPStore would listen on every interface."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _ByFile


class _ByFile(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        meeting = Path(tempfile.mkdtemp(dir=backend_config.folder)) / "store"  # of its own for every group that starts
        worker_group.execute(_set_torch_distributed_env_vars)
        size, timeout = len(worker_group), timedelta(seconds=backend_config.timeout_s)
        given = (str(meeting), size, backend_config.backend, timeout)
        joined = [worker_group.execute_single_async(rank, _meet, rank, *given) for rank in range(size)]
        try:
            ray.get(joined)
        except RayTaskError:
            for one in joined:  # a worker that fails because another has died: the death is the cause, and is survived
                with suppress(RayTaskError, GetTimeoutError):
                    ray.get(one, timeout=10)
            raise


def _meet(rank: int, path: str, size: int, backend: str, timeout: timedelta) -> None:
    store = dist.FileStore(path, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


class StopOnError(UserCallback):
    """Runs in Ray Train's controller: an error of the training itself is not tried again, a lost worker is, and is told."""

    def __init__(self, board: Address) -> None:
        self._board, self._told = board, ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        lost = []
        for rank, error in sorted(worker_exceptions.items()):
            of_ray = type(error).__module__.partition(".")[0] == "ray"  # a dead process, a lost node, no answer
            if of_ray:
                lost.append(f"rank {rank}: {reason(error)}")
            elif not isinstance(error, PeerLostError):
                name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                raise UserError(f"rank {rank}: {name}{error}")
        text = "a worker was lost" + (f" ({'; '.join(lost)})" if lost else "")
        if worker_exceptions and text != self._told:  # Ray may ask again while the others end
            self._told = text
            posted = Posted(self._board)
            posted.line(text)
            posted.finish()


def reason(error: BaseException) -> str:
    """An error of Ray's in a line: its first that says something, without the actor's particulars."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
