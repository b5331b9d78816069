"""How the workers of a run find each other, and what becomes of those that cannot."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import tempfile
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero

from cibl_ray.world import EXCHANGE_TIMEOUT, PeerLostError, World
from pipelines.common.errors import UserError

_MEETING_TIMEOUT = timedelta(seconds=45)  # for all workers to meet
_REACH = 15.0  # seconds for a connection to another worker
_AGAIN = 0.2  # seconds between two looks for the others' messages


@dataclass(frozen=True)
class Group:
    """The workers that train together, one of which this is.

    Attributes:
        size: How many they are.
        local_size: How many of them are on this machine.
        left_out: Which workers are not among them, and why; empty where all are.
    """

    size: int
    local_size: int
    left_out: str = ""


def join_peers(meeting: str | None, relay: Any, least: int, cuda: bool) -> Group | None:
    """Make a process group of all workers that reach each other. One worker alone needs none.

    Args:
        meeting: A folder that all workers see, on a cluster of one machine: they meet in a file there, because torch's TCPStore
            listens on every interface. None: they meet at a port of a worker's node.
        relay: The handle of the driver's `Relay`, through which they tell each other where they are.
        least: How many workers the run needs.
        cuda: Whether gradients are on GPUs.

    Returns:
        The group; None where the others train without this worker, because it cannot reach them.

    Raises:
        UserError: Too few workers reach each other.
        PeerLostError: The workers could not meet.
    """
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, size, local_size = context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
    if size == 1:
        return Group(1, 1)
    address = ray.util.get_node_ip_address()
    interface = interface_of(address)
    if interface is not None:
        # gloo, which NCCL's runs use too, would take the address that the machine's own name resolves to: on Debian 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    here, backend = f"{address} ({interface})", "nccl" if cuda else "gloo"
    store: dist.Store
    try:
        if meeting is not None:
            path = broadcast_from_rank_zero(tempfile.mkdtemp(dir=meeting) if rank == 0 else None)
            store = dist.FileStore(str(Path(str(path)) / "store"), size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=EXCHANGE_TIMEOUT)
            return Group(size, local_size)
        notes = _Notes(relay, str(broadcast_from_rank_zero(secrets.token_hex(8) if rank == 0 else None)), rank)
        addresses, failures = _reach_all(notes, here, address, size)
        members = largest_group([{*range(size)} - {*failed} for failed in failures])
        mine = next(iter(failures[rank].values()), "")
        if len(members) < least:
            if mine:
                raise UserError(mine)
            raise PeerLostError(f"rank {rank} on {here} waits for workers that cannot reach each other")
        if rank not in members:
            return None
        leader, size = members[0], len(members)
        if size > 1:
            if rank == leader:
                served = dist.TCPStore(address, 0, size, True, _MEETING_TIMEOUT, wait_for_workers=False)
                notes.share("store", served.port, [leader])
                store = served
            else:
                store = dist.TCPStore(
                    addresses[leader], notes.share("store", None, [leader])[leader], size, False, _MEETING_TIMEOUT
                )
            store.set_timeout(EXCHANGE_TIMEOUT)
            place = members.index(rank)
            dist.init_process_group(backend, store=store, rank=place, world_size=size, timeout=EXCHANGE_TIMEOUT)
    except RuntimeError as error:  # of torch.distributed
        reason = str(error).strip().partition("\n")[0]
        raise PeerLostError(f"rank {rank} on {here} cannot reach the other workers: {reason}") from error
    if not (others := [str(other) for other in range(len(addresses)) if other not in members]):
        return Group(size, local_size)
    local = sum(addresses[member] == address for member in members)
    text = f"training without rank{'s' * (len(others) > 1)} {', '.join(others)}"
    return Group(size, local, f"{text}: {mine}" if mine else text)


class _Notes:
    """What the workers of one meeting tell each other through the driver. The relay's errors are a lost driver."""

    def __init__(self, relay: Any, meeting: str, rank: int) -> None:
        self._relay, self._meeting, self._rank = relay, meeting, rank

    def share(self, name: str, value: Any, ranks: Collection[int]) -> dict[int, Any]:
        """Post this worker's value, and wait for those of `ranks`.

        Raises:
            PeerLostError: They do not arrive.
        """
        deadline = time.monotonic() + _MEETING_TIMEOUT.total_seconds()
        while True:
            with suppress(RayError):
                place, timeout = f"{self._meeting}/{name}", max(deadline - time.monotonic(), 1)
                found: dict[int, Any] = ray.get(self._relay.meet.remote(place, self._rank, value), timeout=timeout)
                if found.keys() >= {*ranks}:
                    return found
            if time.monotonic() > deadline:
                raise PeerLostError(f"rank {self._rank} waited {_MEETING_TIMEOUT.total_seconds():.0f} s for the other workers")
            time.sleep(_AGAIN)


def _reach_all(notes: _Notes, here: str, address: str, size: int) -> tuple[dict[int, str], list[dict[int, str]]]:
    """Connect to every other worker once: gloo would wait for minutes, and say less.

    Returns:
        The address of each worker, and for each worker why it cannot reach which others.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    everyone = range(size)
    with socket.create_server((address, 0), family=family, backlog=size) as server:
        places = notes.share("place", [address, server.getsockname()[1]], everyone)
        with ThreadPoolExecutor(32) as pool:
            reasons = [*pool.map(lambda other: _why_not(here, other, *places[other]), everyone)]
        failed = {other: reason for other, reason in enumerate(reasons) if reason}
        failures = notes.share("failed", failed, everyone)
    return {rank: place[0] for rank, place in places.items()}, [failures[rank] for rank in everyone]


def _why_not(here: str, other: int, host: str, port: int) -> str:
    """Why a worker cannot be reached; empty where it can be."""
    try:
        socket.create_connection((host, port), timeout=_REACH).close()
    except OSError as error:
        return (
            f"{here} cannot reach rank {other} at {host}:{port}: {error}; open the ports between the nodes: workers choose "
            "free ones (net.ipv4.ip_local_port_range)"
        )
    return ""


def largest_group(reached: Sequence[Collection[int]]) -> list[int]:
    """Find many workers of which each reaches each other.

    Args:
        reached: For each rank, which ranks it reaches, itself among them.

    Returns:
        Their ranks, in order. From each worker on, those are added that fit to all before; the largest such group counts.
    """
    best: list[int] = []
    for first in range(len(reached)):
        group = [first]
        for other in range(len(reached)):
            if other != first and all(other in reached[member] and member in reached[other] for member in group):
                group.append(other)
        if len(group) > len(best):
            best = sorted(group)
    return best


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
