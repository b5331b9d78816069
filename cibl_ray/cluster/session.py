"""The cluster that a command works in: one of its own on this machine, or one that it joins."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray

import cibl_ray
import pipelines
from cibl_ray.cluster.environment import HEALTH_CHECK
from cibl_ray.cluster.failures import first_line
from pipelines.common.errors import UserError

_ANSWER = 10.0  # seconds for a cluster's head node to accept a connection
_JOIN = 60.0  # seconds for a cluster to take this process in
_NO_NODE = "No node info found"  # what Ray says after as long where this machine is no node of the cluster


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Start a cluster of this machine's own, or join one, until the end of the block.

    The nodes of a cluster that is joined get this process's code. Ray's own output is not shown.

    Args:
        address: HOST:PORT of the cluster to join, or 'auto': that of RAY_ADDRESS, or the one on this machine. None starts one.

    Raises:
        UserError: The cluster did not start, does not answer, or refuses this process.
    """
    if address is None:
        _start()
    else:
        _join(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _start() -> None:
    try:
        ray.init(address="local", include_dashboard=False, num_cpus=len(os.sched_getaffinity(0)), **_QUIET)
    except BaseException as error:
        ray.shutdown()
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise UserError(
            f"Ray did not start on this machine: {type(error).__name__}: {first_line(error)}; its sockets and logs need a "
            "folder with a short name and some space: RAY_TMPDIR=/tmp/NAME sets one"
        ) from error


def _join(address: str) -> None:
    place, named = address, f"--address {address}"
    if address == "auto" and (found := os.environ.get("RAY_ADDRESS")):
        place, named = found, f"--address auto: RAY_ADDRESS={found}"
    if place == "auto":
        _connect(place, named)
        place = ray.get_runtime_context().gcs_address
        ray.shutdown()
    _answers(place, named)
    packages = [str(Path(package.__file__ or "").parent) for package in (cibl_ray, pipelines)]
    # RAY_ADDRESS: what asks for the cluster's state there should ask this one. Trials on the nodes start workers of their own.
    inherited = {name: os.environ[name] for name in (HEALTH_CHECK,) if name in os.environ}
    _connect(place, named, py_modules=packages, env_vars={"MALLOC_ARENA_MAX": "1", "RAY_ADDRESS": place, **inherited})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    joined = f"{ray.get_runtime_context().gcs_address}: {len(nodes)} nodes, {cpus} CPUs, {gpus} GPUs"
    print(f"joined the cluster at {joined}", file=sys.stderr)


def _connect(place: str, named: str, **runtime_env: Any) -> None:
    error = _within(_JOIN, lambda: ray.init(address=place, runtime_env=runtime_env or None, **_QUIET))
    if isinstance(error, TimeoutError) and place == "auto":
        raise UserError(f"{named}: no cluster answers within {_JOIN:g} s; give the head node's HOST:PORT")
    if isinstance(error, TimeoutError) or _NO_NODE in str(error):  # its port has answered
        raise UserError(
            f"{named}: it answers, but did not take this process in within {_JOIN:g} s; run the command on one of the "
            "cluster's nodes, or by ray job submit"
        )
    if error is not None:
        raise UserError(f"{named}: {why(error, place)}") from error


def _answers(address: str, named: str) -> None:
    """Raise UserError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.removeprefix("[").removesuffix("]"), int(port)), timeout=_ANSWER).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{named}: {error}; give the head node's HOST:PORT (6379 by default), or 'auto'") from error


def _within(seconds: float, act: Any) -> BaseException | None:
    """Call `act` in a thread. Returns its error, or a TimeoutError where it has not ended in time, or None."""
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            act()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return ended[0] if ended else TimeoutError()


def why(error: BaseException, place: str) -> str:
    """Why the cluster at `place` did not take this process in, in a line."""
    text = " ".join(str(error).split())
    if "Version mismatch" in text:
        return f"the cluster has another Ray or Python than this process: {text[:300]}"
    if isinstance(error, ConnectionError) and place != "auto":
        return f"{first_line(error)}; does it ask for another token? Put its own into RAY_AUTH_TOKEN or ~/.ray/auth_token"
    return f"{type(error).__name__}: {first_line(error)}"


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextmanager
def polite_end() -> Iterator[set[int]]:
    """Treat SIGTERM as Ctrl-C, which Ray Tune's own handler turns into an orderly end of all trials.

    Yields:
        A set that gets SIGTERM's number when it comes. In another thread than the main one nothing changes.
    """
    heard: set[int] = set()
    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield heard
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        heard.add(number)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt), signal.getsignal(signal.SIGINT)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
