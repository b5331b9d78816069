"""`python -m serve --simple`: the same application under uvicorn, in this process alone. No Ray, no HAProxy, one replica."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.common.errors import UserError
from serve.haproxy import addresses
from serve.server import Server
from serve.settings import check

ANNOUNCE, ANSWER = 1.0, 5.0  # seconds of 503 before the listener closes; seconds for what was asked before


@contextmanager
def running(args: dict[str, Any], host: str, port: int) -> Iterator[Server]:
    """Serve until the end of the block, and then answer what was asked before.

    Args:
        args: Field names of `ServiceConfig` with their values.
        host: The name or address to listen on.
        port: The port; 0 takes a free one.

    Yields:
        The server.

    Raises:
        UserError: A setting is wrong, the port is taken, or a bundle cannot be used.
    """
    config = check(args)
    if config.replicas > 1 or config.max_replicas:
        raise UserError("--simple has one process; leave --replicas, or leave --simple")
    address = addresses(host)[0]
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: {address}: {error}; choose another") from error
    server = Server(config, listener, config)
    announce = 0.0
    try:
        server.load(config.bundles)
        yield server
        announce = ANNOUNCE
    finally:
        server.stop(ANSWER if announce else 0, announce)
