"""`python -m serve BUNDLE...`: serve exported models on this machine; listens on 127.0.0.1 unless told otherwise.

A bundle that is replaced in its place (move a new one there) is taken up without a failed request, if it works.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from cibl_ray.bundle.card import open_bundle
from cibl_ray.bundle.targets import misfit
from pipelines.common.errors import CommandParser, UserError, run_command
from serve.haproxy import addresses, authority
from serve.local import running
from serve.settings import KEYS, check


def main() -> None:
    parser = CommandParser(prog="python -m serve", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="folder written by python -m cibl_ray.export")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", default="1", help="processes that answer; MIN-MAX scales with the load (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime in each replica (default: 1)")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32")
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda", "tensorrt"], default="auto")
    parser.add_argument("--max-batch", type=int, default=32, help="images of one call (default: 32)")
    parser.add_argument("--max-queue", type=int, default=256, help="requests waiting in a replica; more get 503 (default: 256)")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys, one a line; without, everyone who reaches the port may ask"
    )
    parser.add_argument("--access-log", type=Path, metavar="FOLDER", help="JSON lines, one file a replica")
    parser.add_argument(
        "--cors", nargs="+", metavar="ORIGIN", default=[], help="pages of these origins may call the service; '*' allows all"
    )
    arguments = parser.parse_args()
    least, most = _replicas(arguments.replicas)
    bundles = [open_bundle(path) for path in arguments.bundles]  # a mistake is told before anything is started
    names = [bundle.card.name for bundle in bundles]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two bundles have the name {twice!r}; export one under another: --name")
    for bundle in bundles:
        if arguments.precision not in bundle.models:
            made = ", ".join(bundle.models)
            raise UserError(f"{str(bundle.folder)!r} has no {arguments.precision} model; it has {made}: --precision")
        # Replicas log it, where nobody looks.
        if arguments.precision == "int8" and arguments.provider in ("auto", "cpu") and (problem := misfit(bundle.card.source)):
            from cibl_ray.bundle.runtime import usable

            if arguments.provider == "cpu" or not usable("cuda"):
                print(f"warning: {str(bundle.models['int8'].path)!r} {problem}", file=sys.stderr)
    args: dict[str, Any] = {
        "bundles": [str(path.absolute()) for path in arguments.bundles],
        "precision": arguments.precision,
        "provider": arguments.provider,
        "threads": arguments.threads,
        "replicas": least,
        "max_replicas": most if most > least else None,
        "max_batch": arguments.max_batch,
        "max_queue": arguments.max_queue,
        "keys_file": str(arguments.keys.absolute()) if arguments.keys else None,
        "access_log": str(arguments.access_log.absolute()) if arguments.access_log else None,
        "cors": arguments.cors,
    }
    check(args)
    _free(arguments.host, arguments.port)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    where = f"http://{authority(arguments.host, arguments.port)}"
    private = ipaddress.ip_address(addresses(arguments.host)[0]).is_loopback
    with running(args, arguments.host, arguments.port):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        if not private and not (arguments.keys or os.environ.get(KEYS)):
            print(f"warning: everyone who reaches {where} may ask; --keys FILE asks for API keys", file=sys.stderr)
        print(f"serving {', '.join(names)} ({arguments.precision}) on {where}; {where}/docs says how to ask", flush=True)
        while not ended.wait(1):
            pass
        print("answering what was asked, then ending", flush=True)


def _replicas(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        least, most = int(low), int(high or low)
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most <= 1024:
        raise UserError(f"--replicas {text}: give a number, or the least and the most, as in 1-4")
    return least, most


def _free(host: str, port: int) -> None:
    """Raise UserError where the port cannot be listened on: Ray Serve would try for a minute."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: give one from 1 to 65535")
    for address in addresses(host):
        try:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {address}: {error}; choose another") from error


if __name__ == "__main__":
    run_command(main, "'cibl-ray[serve]'")
