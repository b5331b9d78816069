"""Training in Ray Train's workers, from the driver's side.

The driver starts or joins a cluster, asks for workers, and shows rank 0's progress. A lost worker is replaced, and the run
resumes from its last checkpoint. An error of the training itself ends the run, and names the rank and the cause.

Call `cibl_ray.cluster.environment.configure_ray_env` before this module is imported.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from cibl_ray.cluster.environment import is_own_cluster
from cibl_ray.cluster.failures import LostError, StopOnError, explain
from cibl_ray.cluster.options import FAILURES, Options, Shape, fitting_cpus, parse_workers, places
from cibl_ray.cluster.progress import Watch, show_progress
from cibl_ray.cluster.session import cluster, polite_end
from cibl_ray.cluster.shared_folder import mark_beside
from cibl_ray.cluster.storage import Mirror, join, remove
from cibl_ray.cluster.worker import begun, train_in_worker
from cibl_ray.config import RunConfig
from cibl_ray.run.folder import need_new
from cibl_ray.run.progress import Progress, Terminal
from cibl_ray.run.stop import Stop, stop_signals
from cibl_ray.training.setup import require_even_parts
from pipelines.common.errors import Interrupted, UserError
from pipelines.prepare.build import ensure_prepared

__all__ = ["FAILURES", "Options", "Shape", "cluster", "fit_on_cluster", "launch", "parse_workers", "places", "polite_end"]

# Seconds for the workers to save, to send what was saved to a store, and to end, when the driver is asked to stop. Slurm's
# signal comes two minutes before the end (configs/cluster/slurm.sh). A second Ctrl-C ends at once.
_SAVING = 100.0
_ANSWER = 3.0  # seconds for the head node to say whether they have a place


def fit_on_cluster(config: RunConfig, folder: Path, resume: bool, options: Options) -> None:
    """Train on a cluster.

    Args:
        config: The run's configuration.
        folder: The run folder. Every node must see it, or a copy of it is kept in `options.storage`.
        resume: Whether the folder has an earlier run, to resume.
        options: The cluster and its workers.

    Raises:
        UserError: The cluster has no room, the training failed, or workers were lost too often.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1; the workers have saved.
    """
    place = options.place(folder)
    if place is not None and not resume and Mirror(folder, place).exists():
        raise UserError(f"{place!r} already has a run; resume it with --resume {place}, or choose another --name")
    if not resume:
        need_new(folder)
    least, most = options.workers
    for workers in range(least, most + 1) if least < most and config.train.tune != "head" else ():  # a head's batch may shrink
        require_even_parts(config.train, workers, f"--workers {least}-{most}")
    # Ray handles SIGTERM in its own way once it has started.
    with stop_signals(), cluster(options.address), stop_signals() as stop:
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
        config = config.with_train(device="cuda" if gpus else "cpu")
        try:
            if options.address is None:
                ensure_prepared(config.data, config.seed)  # here, where its progress is seen; elsewhere once a node
            shape = Shape(options.workers, cpus, gpus, options.failures)
            launch(config, folder, resume, shape, Terminal(), options.storage, stop)
        except KeyboardInterrupt:
            again = f"resume with: {options.resume_command(folder)}"
            text = f"stopped; {again}" if begun(folder, place) else "stopped; nothing was trained yet"
            raise Interrupted(text, stop.status) from None
        except LostError as error:
            again = f"; resume with: {options.resume_command(folder)}" if begun(folder, place) else ""
            raise UserError(f"{error}{again}") from None


def launch(
    config: RunConfig,
    folder: Path,
    resume: bool,
    shape: Shape,
    progress: Progress,
    storage: str | None = None,
    stop: Stop | None = None,
    trial_places: tuple[Any, str] | None = None,
) -> None:
    """Train in Ray Train's workers, in a cluster that this process is connected to.

    Args:
        config: The run's configuration.
        folder: The run folder.
        resume: Whether it has an earlier run.
        shape: The workers.
        progress: Shows what rank 0 reports.
        storage: URI under which a copy of the run folder is kept.
        stop: What asks the run to stop; None: nothing does.
        trial_places: For a trial of a sweep, `TrialPlaces.queue` and the trial's name.

    Raises:
        UserError: The training itself failed; it names the rank and the cause.
        LostError: Workers were lost too often.
        KeyboardInterrupt: `stop` asked for it, and the workers have saved, or have not begun.
    """
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
    name = f"{folder.name}-{time.time_ns()}"  # a name used before would resume what Ray remembers of it
    with (
        show_progress(progress, lambda: _reason_to_wait(shape)) as watch,
        tempfile.TemporaryDirectory(prefix="cibl_ray_") as meeting,
        mark_beside(folder, storage) as mark,
    ):
        given = {
            "config": config.model_dump(mode="json"), "folder": str(folder), "resume": resume, "storage": storage,
            "relay": watch.relay, "cpus": shape.cpus, "mark": mark, "meeting": meeting if is_own_cluster() else None,
            "places": trial_places, "least": least, "run": name,
        }  # fmt: skip
        # Ray Train wants a place that all nodes see; nothing of ours is kept there.
        own = is_own_cluster()
        place = Path(meeting) / "ray" if own else folder.parent / ".ray"
        run = ray.train.RunConfig(
            name=name,
            storage_path=str(place) if own or storage is None else join(storage, ".ray"),
            failure_config=FailureConfig(max_failures=shape.failures),
            callbacks=[StopOnError(watch.relay)],  # type: ignore[list-item]  # likewise
        )
        joined = JoinsByItself(backend="nccl" if shape.gpus else "gloo")
        trainer = TorchTrainer(
            train_in_worker, train_loop_config=given, scaling_config=scaling, run_config=run, torch_config=joined
        )
        try:
            if stop is None:
                trainer.fit()
            else:
                _fit_until_stopped(trainer.fit, watch, stop, _in_line)
        except Exception as error:
            raise explain(error, shape.failures) from error
        finally:
            if own or storage is None:
                shutil.rmtree(place / name, ignore_errors=True)
            else:
                remove(join(join(storage, ".ray"), name))
    if watch.stopped:
        raise KeyboardInterrupt


def _fit_until_stopped(fit: Callable[[], Any], watch: Watch, stop: Stop, in_line: Callable[[], bool]) -> None:
    """Run Ray Train's `fit` in a thread, and have the workers save and end when `stop` asks for it.

    Args:
        fit: Trains, and returns when the workers have ended.
        watch: Hears the workers.
        stop: What asks the run to stop.
        in_line: Whether the workers have no place yet: then nobody has anything to save, and nobody is waited for.

    Raises:
        KeyboardInterrupt: The run was stopped before its workers ended.
    """
    ended = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    deadline = None
    stop.polled = True
    try:
        while not ended.wait(0.2):
            if deadline is None and stop.asked():
                watch.relay.stop.remote()
                deadline = time.monotonic() + (0 if _answered(in_line) else _SAVING)
            if deadline is not None and time.monotonic() > deadline:
                raise KeyboardInterrupt
    finally:
        stop.polled = False
    if failed:
        raise failed[0]


def _answered(question: Callable[[], bool]) -> bool:
    """Whether the answer is yes. A head node that does not answer within seconds, or with an error, is a no."""
    answers: list[bool] = []

    def ask() -> None:
        with suppress(Exception):
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER)
    return bool(answers and answers[0])


@dataclass
class JoinsByItself(TorchConfig):
    """Workers make their process group in the training function: torch's own way would listen on every interface."""

    @property
    def backend_cls(self) -> type[Backend]:
        return SharesGpus


class SharesGpus(Backend):
    """Workers of a node see each other's GPUs, as NCCL wants."""

    share_cuda_visible_devices = True


def _reason_to_wait(shape: Shape) -> str | None:
    """Why nothing happens: there are too few nodes, or other work has them."""
    least, each = shape.workers[0], f"{shape.cpus} CPUs{' and a GPU' * shape.gpus} each"
    with suppress(Exception):  # a head node that does not answer now: if that lasts, the run itself fails
        room = places([node["Resources"] for node in ray.nodes() if node["Alive"]], shape.cpus, shape.gpus)
        if room < least:
            return f"waiting for nodes: there is room for {room} of {least} workers ({each})"
        if _in_line():
            return f"waiting for room: other work has some of what {least} workers need ({each})"
    return None


def _in_line() -> bool:
    """Whether the workers that this driver asked for have no place yet."""
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:  # a trial, one of many that share the job
        return False
    groups = ray.util.placement_group_table()
    return any(group["state"] == "PENDING" and name.endswith(context.get_job_id()) for name, group in groups.items())
