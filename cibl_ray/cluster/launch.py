"""`python -m cibl_ray.train CONFIG --cluster`: the training function of one process, run by Ray Train's workers.

The driver (here) starts or joins a cluster, asks for workers, and shows what rank 0 tells. A lost worker is replaced and the
run goes on from its last checkpoint; an error of the training itself ends it, and names the rank and the cause.

`cibl_ray.cluster.environment.settle` must have been called before this module is imported.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, get_device

import cibl_ray
import pipelines
from cibl_ray import config as run_config
from cibl_ray.cluster.environment import own_cluster
from cibl_ray.cluster.progress_socket import Address, Posted, shown
from cibl_ray.cluster.ray_doze import main_thread_dozes
from cibl_ray.cluster.ray_trainer import LeanTrainer, OneMachineConfig, StopOnError, end_needless, known, reason
from cibl_ray.cluster.shared_folder import mark_beside, same_folder
from cibl_ray.cluster.storage import Mirror, join
from cibl_ray.hardware import TIMER_LAG, keep_freed_memory, let_timers_lag
from cibl_ray.run.folder import CHECKPOINTS, is_run, need_new
from cibl_ray.run.progress import Progress, Silent, Terminal
from cibl_ray.world import PeerLostError, World
from pipelines.common.cores import limit_cores
from pipelines.common.errors import Interrupted, UserError
from pipelines.common.settings import validate
from pipelines.prepare.build import ensure_prepared

_EXCHANGE_TIMEOUT = 600  # seconds without an answer after which a worker counts as lost
_SERVICES_LAG = 0.25  # seconds
FAILURES = 3  # lost workers replaced, by default


@dataclass(frozen=True)
class Options:
    """workers: how many, or at least and at most. address: of a cluster to join; None starts one on this machine. cpus: of each
    worker; None: what fits. failures: lost workers to replace before giving up."""

    workers: tuple[int, int]
    address: str | None
    cpus: int | None
    failures: int
    storage: str | None = None

    def place(self, folder: Path) -> str | None:
        """Where a run's copy is kept."""
        return join(self.storage, folder.name) if self.storage is not None else None

    def again(self, folder: Path) -> str:
        """The command that goes on with a run."""
        least, most = self.workers
        workers = f"{least}-{most}" if most > least else least
        run = shlex.quote(str(self.place(folder) or folder))
        more = f" --address {self.address}" if self.address else ""
        more += f" --cpus-per-worker {self.cpus}" if self.cpus else ""
        more += f" --max-failures {self.failures}" if self.failures != FAILURES else ""
        return f"python -m cibl_ray.train --resume {run} --cluster --workers {workers}{more}"


def parse_workers(text: str) -> tuple[int, int]:
    """'4' or '2-8'. Raises UserError."""
    low, _, high = text.partition("-")
    try:
        workers = int(low), int(high or low)
    except ValueError:
        workers = 0, 0
    if not 1 <= workers[0] <= workers[1]:
        raise UserError(f"--workers {text}: give a number of workers, or the least and the most, as in 2-8")
    return workers


def fit_on_cluster(config: run_config.RunConfig, folder: Path, resume: bool, options: Options) -> None:
    """Train in `folder`, new or (with `resume`) an earlier run's, on a cluster.

    Every node must see the folder, or a copy of it is kept in `options.storage`.
    """
    place = options.place(folder)
    if place is not None and not resume and Mirror(folder, place).exists():
        raise UserError(f"{place!r} already has a run; go on with --resume {place}, or choose another --name")
    if not resume:
        need_new(folder)
    with cluster(options.address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = config.train.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
        if config.train.device == "cuda" and not gpus:
            raise UserError("train.device is 'cuda', but the cluster has no GPU; set it to 'cpu' or 'auto'")
        cpus = options.cpus or fitting_cpus(nodes, options.workers, gpus)
        if places(nodes, cpus, gpus) < options.workers[0]:
            raise UserError(
                f"--workers {options.workers[0]}: there is room for {places(nodes, cpus, gpus)} with {cpus} CPUs"
                f"{' and a GPU' if gpus else ''} each; lower --workers or --cpus-per-worker"
            )
        train = config.train.model_copy(update={"device": "cuda" if gpus else "cpu"})
        config = config.model_copy(update={"train": train})
        with polite_end():
            try:
                if options.address is None:
                    ensure_prepared(config.data, config.seed)  # here, where its progress is seen; elsewhere once a node
                shape = Shape(options.workers, cpus, gpus, options.failures, own=options.address is None)
                launch(config, folder, resume, shape, Terminal(), options.storage)
            except (SystemExit, KeyboardInterrupt):
                again = f"go on from the last checkpoint with: {options.again(folder)}"
                raise Interrupted(f"stopped; {again}" if begun(folder, place) else "stopped; nothing was trained yet") from None
            except LostError as error:
                again = f"; go on with: {options.again(folder)}" if begun(folder, place) else ""
                raise UserError(f"{error}{again}") from None


def begun(folder: Path, place: str | None) -> bool:
    """Whether there is a run to go on with, here or in its store."""
    return is_run(folder) or (place is not None and Mirror(folder, place).exists())


class LostError(RuntimeError):
    """Workers were lost more often than they are replaced."""


@dataclass(frozen=True)
class Shape:
    """workers: at least and at most; cpus and gpus of each; failures: how often lost ones are replaced; own: whether
    the cluster is this machine's own."""

    workers: tuple[int, int]
    cpus: int
    gpus: bool
    failures: int
    own: bool = False


def launch(
    config: run_config.RunConfig, folder: Path, resume: bool, shape: Shape, progress: Progress, storage: str | None = None
) -> None:
    """Train in Ray Train's workers, in a cluster that this process is connected to; rank 0 tells `progress`.

    Raises UserError with the cause and its rank, where the training itself failed, and LostError.
    """
    given = {"config": config.model_dump(mode="json"), "folder": str(folder), "resume": resume, "storage": storage}
    least, most = shape.workers
    if least < most:
        # Such a run asks for what it believes is there. Where that fails, as a rule because Ray had not yet missed a node that
        # is gone, it looks and asks again after so long instead of a minute.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    scaling = ScalingConfig(
        num_workers=most if least == most else shape.workers,  # type: ignore[arg-type]  # typed as the first version's
        use_gpu=shape.gpus,
        resources_per_worker={"CPU": shape.cpus} | ({"GPU": 1} if shape.gpus else {}),
        elastic_resize_monitor_interval_s=30,  # type: ignore[call-arg]  # likewise
    )
    exchange: dict[str, Any] = {"backend": "nccl" if shape.gpus else "gloo", "timeout_s": _EXCHANGE_TIMEOUT}

    def waits() -> str | None:
        try:
            return _lacks()
        except Exception:  # a head node that does not answer just now: the run itself says so, if it lasts
            return None

    def _lacks() -> str | None:
        room = places([node["Resources"] for node in ray.nodes() if node["Alive"]], shape.cpus, shape.gpus)
        each = f"{shape.cpus} CPUs{' and a GPU' * shape.gpus} each"
        if room < least:
            return f"waiting for nodes: there is room for {room} of {least} workers ({each})"
        return f"waiting for room: other work has some of what {least} workers need ({each})" if _in_line() else None

    with (
        shown(ray.util.get_node_ip_address(), progress, waits) as board,
        tempfile.TemporaryDirectory(prefix="cibl_ray_") as meeting,
        mark_beside(folder, storage) as mark,
    ):
        given |= {"board": asdict(board), "cpus": shape.cpus, "mark": mark}
        run = RunConfig(
            name=f"{folder.name}-{time.time_ns()}",  # a name used before would go on with what Ray remembers of it
            storage_path=join(storage, ".ray") if storage is not None else str(folder.parent / ".ray"),
            failure_config=FailureConfig(max_failures=shape.failures),
            callbacks=[StopOnError(board)],  # type: ignore[list-item]  # likewise
        )
        one_machine = own_cluster() and known()
        joined = OneMachineConfig(**exchange, folder=meeting) if one_machine else TorchConfig(**exchange)
        trainer = LeanTrainer(_worker, train_loop_config=given, scaling_config=scaling, run_config=run, torch_config=joined)
        trainer.alone = shape.own and least == most
        try:
            trainer.fit()
        except ray.train.ControllerError as error:
            if isinstance(error.controller_failure, UserError):
                raise error.controller_failure from None
            raise
        except ray.train.WorkerGroupError as error:
            lost = ", ".join(f"rank {rank} ({reason(cause)})" for rank, cause in sorted(error.worker_failures.items()))
            raise LostError(f"workers were lost {shape.failures + 1} times, at last {lost}") from None
        except RayActorError as error:
            raise LostError(f"what ran the workers was lost: {reason(error)}") from None


def _in_line() -> bool:
    """Whether the workers that this driver asked for have no place yet."""
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:  # a trial, one of many that share the job
        return False
    groups = ray.util.placement_group_table()
    return any(group["state"] == "PENDING" and name.endswith(context.get_job_id()) for name, group in groups.items())


def fitting_cpus(nodes: list[dict[str, float]], workers: tuple[int, int], gpus: bool) -> int:
    """The most CPUs a worker can have for as many workers as wanted, or as can be, to find room on these nodes; at least 1."""
    wanted = max(workers[0], min(workers[1], places(nodes, 1, gpus)))
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    return next((cpus for cpus in range(most, 1, -1) if places(nodes, cpus, gpus) >= wanted), 1)


def places(nodes: list[dict[str, float]], cpus: int, gpus: bool) -> int:
    """How many workers of `cpus` CPUs (and a GPU) the nodes have room for."""
    return sum(min(int(node.get("CPU", 0)) // cpus, int(node.get("GPU", 0)) if gpus else sys.maxsize) for node in nodes)


@contextmanager
def cluster(address: str | None, dashboard: bool = False) -> Iterator[None]:
    """A cluster to work in: the one at `address`, whose nodes get this code, or one of this machine's own."""
    own = address is None
    if address is not None and address != "auto":
        _answers(address)
    packages = [str(Path(package.__file__ or "").parent) for package in (cibl_ray, pipelines)]
    if own:
        # Ray's processes are made of threads that look four times a second whether there is anything to do, each at a moment of
        # its own, on the cores that train. What they are asked for wakes them at once all the same.
        let_timers_lag(_SERVICES_LAG)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=dashboard if own else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            num_cpus=len(os.sched_getaffinity(0)) if own else None,
            # One heap, as `settle` sets it for a cluster of this machine's own.
            runtime_env=None if own else {"py_modules": packages, "env_vars": {"MALLOC_ARENA_MAX": "1"}},
        )
    except (ConnectionError, RayError, ValueError) as error:
        if own:
            raise
        raise UserError(f"--address {address}: {str(error).strip().partition(chr(10))[0]}") from error
    finally:
        let_timers_lag(TIMER_LAG)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if own and not dashboard and known():
        end_needless()
    try:
        yield
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Raise UserError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UserError(f"--address {address}: {error}; give the head node's HOST:PORT (6379 by default), or 'auto'") from error


def _worker(given: dict[str, Any]) -> None:
    """One worker's process: joins the others, trains, and goes on where an earlier group of workers was lost."""
    import torch

    from cibl_ray.training.fit import fit

    keep_freed_memory()
    let_timers_lag(TIMER_LAG)  # Ray's processes have left more
    config = validate(run_config.RunConfig, given["config"], "the driver")
    if config.train.device == "cuda":
        torch.cuda.set_device(get_device())
    else:
        torch.set_num_threads(given["cpus"])
    limit_cores(given["cpus"])
    if torch.distributed.get_world_size() == 1:
        torch.distributed.destroy_process_group()  # nobody to talk to, and its thread wakes as often as Ray's
    world, folder = World(), Path(given["folder"])
    posted = Posted(Address(**given["board"]))
    progress: Progress = posted if world.is_rank0 else Silent()
    mirror = None
    if given["storage"] is not None and world.is_rank0:
        mirror = Mirror(folder, join(given["storage"], folder.name))
        mirror.claim(given["resume"])
        if mirror.exists() and not mirror.behind():  # what was saved here and not sent any more is this run's too
            mirror.download()
    try:
        same_folder(folder, given["mark"])  # on every node: any may be the first after a loss
        # The driver has made sure that a new run has no folder yet: one that is there is this run's, of lost workers.
        there = world.broadcast_from_rank0(lambda: begun(folder, None))
        if there and world.is_rank0 and (folder / CHECKPOINTS).exists():
            progress.line("going on from the last checkpoint")
        resume = given["resume"] or there or given["storage"] is not None
        with main_thread_dozes():
            # The process of a lost worker may end later; a lock that a lost node held on a network's disk lasts minutes.
            upload = None if mirror is None else mirror.upload
            fit(config, folder, resume, world, progress, upload, patience=30 if own_cluster() else 180)
    except PeerLostError:
        time.sleep(5)  # the worker with the cause is heard first
        raise
    except UserError:
        raise
    except BaseException:
        posted.error(traceback.format_exc())
        raise
    finally:
        posted.finish()


@contextmanager
def polite_end() -> Iterator[None]:
    """SIGTERM is treated as Ctrl-C, which Ray's own handlers turn into an orderly end of all workers and trials."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt), signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
