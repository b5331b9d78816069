"""The training function of a Ray Train worker."""

from __future__ import annotations

import os
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import get_device

from cibl_ray.cluster.cut_off import end_when_cut_off
from cibl_ray.cluster.environment import is_own_cluster
from cibl_ray.cluster.meeting import join_peers, leave_peers
from cibl_ray.cluster.progress import RelayedProgress, RelayedStop
from cibl_ray.cluster.ray_workarounds import register_place
from cibl_ray.cluster.shared_folder import same_folder
from cibl_ray.cluster.storage import Mirror, join
from cibl_ray.cluster.uploads import uploads
from cibl_ray.config import RunConfig
from cibl_ray.hardware import keep_freed_memory
from cibl_ray.run.folder import is_run
from cibl_ray.run.progress import Progress, Silent
from cibl_ray.world import PeerLostError, World
from pipelines.common.cores import limit_cores
from pipelines.common.errors import UserError
from pipelines.common.validation import validate


def begun(folder: Path, place: str | None) -> bool:
    """Whether there is a run to resume, in its folder or in its copy at the URI `place`."""
    return is_run(folder) or (place is not None and Mirror(folder, place).exists())


def train_in_worker(given: dict[str, Any]) -> None:
    """Join the other workers and train, from the last checkpoint where an earlier group of workers was lost.

    Args:
        given: What `launch` passes on.
    """
    register_place(given["places"])
    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    relayed, stop = RelayedProgress(given["relay"]), RelayedStop(given["relay"], hears_notices=given["meeting"] is None)
    if stop.ask():  # before anything was trained
        if first:
            relayed.stopped()
            relayed.finish()
        return
    import torch

    from cibl_ray.training.fit import fit

    keep_freed_memory()
    config = validate(RunConfig, given["config"], "the driver")
    cuda = config.train.device == "cuda"
    if cuda:
        torch.cuda.set_device(get_device())
    else:
        torch.set_num_threads(given["cpus"])
    limit_cores(given["cpus"])
    try:
        group = join_peers(given["meeting"], given["relay"], given["least"], cuda)
        if group is None:  # the others train without this one
            return
        # As torchrun sets them: loaders ask how many workers share this machine.
        os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"] = str(group.size), str(group.local_size)
        world, folder = World(), Path(given["folder"])
        first = world.is_rank0
        if group.left_out:
            stop.hears_notices = False  # Ray waits for an answer of all its workers
            if first:
                relayed.line(group.left_out)
        progress: Progress = relayed if first else Silent()
        mirror = None
        if given["storage"] is not None and first:
            mirror = Mirror(folder, join(given["storage"], folder.name))
            mirror.claim(given["resume"], given["run"])
            if mirror.exists() and not mirror.behind():  # what was saved here and not sent any more is this run's too
                mirror.download()
        same_folder(folder, given["mark"])  # on every node: any may have rank 0 after a loss
        # The driver has made sure that a new run has no folder yet: one that is there is this run's, of lost workers.
        there = world.broadcast_from_rank0(lambda: begun(folder, None))
        resume = given["resume"] or there or given["storage"] is not None
        # The process of a lost worker may end later; a lock that a lost node held on a network's disk lasts minutes.
        watched = nullcontext() if is_own_cluster() else end_when_cut_off(given["relay"])
        with watched, uploads(mirror, progress) as upload:
            fit(config, folder, resume, world, progress, upload, patience=30 if is_own_cluster() else 180, stop=stop)
        leave_peers(world)
    except KeyboardInterrupt:  # the driver asked for it, and rank 0 has saved
        if first:
            relayed.stopped()
    except PeerLostError:
        if stop.ask():  # rank 0 has saved and ended
            return
        time.sleep(5)  # Ray should hear first of the worker that failed
        raise
    except UserError:
        raise
    except BaseException:
        relayed.error(traceback.format_exc())
        raise
    finally:
        relayed.finish()
