"""The training function of a Ray Train worker."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from cibl_ray.cluster.environment import is_own_cluster
from cibl_ray.cluster.progress import RelayedProgress, RelayedStop
from cibl_ray.cluster.ray_workarounds import register_place
from cibl_ray.cluster.shared_folder import same_folder
from cibl_ray.cluster.storage import Mirror, join
from cibl_ray.cluster.uploads import uploads
from cibl_ray.config import RunConfig
from cibl_ray.hardware import keep_freed_memory
from cibl_ray.run.folder import is_run
from cibl_ray.run.progress import Progress, Silent
from cibl_ray.world import EXCHANGE_TIMEOUT, PeerLostError, World
from pipelines.common.cores import limit_cores
from pipelines.common.errors import UserError
from pipelines.common.validation import validate

_MEETING_TIMEOUT = timedelta(seconds=45)  # for all workers to meet
_REACH = 15.0  # seconds for a connection to another worker


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
    relayed, stop = RelayedProgress(given["relay"]), RelayedStop(given["relay"], joined=given["meeting"] is None)
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
    # As torchrun sets them: loaders ask how many workers share this machine.
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    try:
        join_peers(given["meeting"], cuda)
        world, folder = World(), Path(given["folder"])
        progress: Progress = relayed if first else Silent()
        mirror = None
        if given["storage"] is not None and first:
            mirror = Mirror(folder, join(given["storage"], folder.name))
            mirror.claim(given["resume"])
            if mirror.exists() and not mirror.behind():  # what was saved here and not sent any more is this run's too
                mirror.download()
        same_folder(folder, given["mark"])  # on every node: any may have rank 0 after a loss
        # The driver has made sure that a new run has no folder yet: one that is there is this run's, of lost workers.
        there = world.broadcast_from_rank0(lambda: begun(folder, None))
        resume = given["resume"] or there or given["storage"] is not None
        # The process of a lost worker may end later; a lock that a lost node held on a network's disk lasts minutes.
        with uploads(mirror) as upload:
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


def join_peers(meeting: str | None, cuda: bool) -> None:
    """Make a process group of all workers. One worker alone needs none.

    Args:
        meeting: A folder that all workers see, on a cluster of one machine: they meet in a file there, because torch's TCPStore
            listens on every interface. None: they meet at a port of rank 0's node.
        cuda: Whether gradients are on GPUs.

    Raises:
        UserError: A worker cannot reach another one.
        PeerLostError: The workers could not meet.
    """
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    if size == 1:
        return
    address = ray.util.get_node_ip_address()
    interface = interface_of(address)
    if interface is not None:
        # gloo, which NCCL's runs use too, would take the address that the machine's own name resolves to: on Debian 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store: dist.Store
    try:
        if meeting is not None:
            path = broadcast_from_rank_zero(tempfile.mkdtemp(dir=meeting) if rank == 0 else None)
            store = dist.FileStore(str(Path(str(path)) / "store"), size)
        else:
            here = f"{address} ({interface})"
            if rank == 0:
                served = dist.TCPStore(address, 0, size, True, _MEETING_TIMEOUT, wait_for_workers=False)
                broadcast_from_rank_zero([address, served.port])
                store = served
            else:
                found: Any = broadcast_from_rank_zero(None)
                host, port = found
                _reach(here, 0, host, port)
                store = dist.TCPStore(host, port, size, False, _MEETING_TIMEOUT)
            _reach_all(store, here, address, rank, size)
            store.set_timeout(EXCHANGE_TIMEOUT)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=EXCHANGE_TIMEOUT)
    except RuntimeError as error:  # of torch.distributed
        reason = str(error).strip().partition("\n")[0]
        raise PeerLostError(f"rank {rank} on {address} ({interface}) cannot reach the other workers: {reason}") from error


def _reach_all(store: Any, here: str, address: str, rank: int, size: int) -> None:
    """Connect to every other worker once: gloo would wait for minutes, and say less.

    Raises:
        UserError: One cannot be reached.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=size) as server:
        store.set(f"reach/{rank}", str(server.getsockname()[1]))
        store.set(f"address/{rank}", address)
        for other in range(size):
            if other != rank:
                _reach(here, other, store.get(f"address/{other}").decode(), int(store.get(f"reach/{other}")))
        if store.add("reached", 1) == size:
            store.set("all", "1")
        store.wait(["all"])


def _reach(here: str, other: int, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=_REACH).close()
    except OSError as error:
        raise UserError(
            f"{here} cannot reach rank {other} at {host}:{port}: {error}; open the ports between the nodes: workers choose "
            "free ones (net.ipv4.ip_local_port_range)"
        ) from error


def leave_peers(world: World) -> None:
    """End the process group: its threads must not outlive Python."""
    import torch.distributed as dist

    if dist.is_initialized():
        world.close()
        dist.destroy_process_group()


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has an address, IPv4 or IPv6; None where it is not found."""
    import fcntl

    if ":" in address:
        with suppress(OSError):
            wanted = socket.inet_pton(socket.AF_INET6, address).hex()
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                fields = line.split()
                if fields[0] == wanted:
                    return fields[-1]
        return None
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
