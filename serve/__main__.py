"""`python -m serve BUNDLE...`: serve exported models on this machine. It listens on 127.0.0.1 unless --host says otherwise.

Replace a bundle in its place (move a new one there) and it is loaded without a failed request, if it works.
"""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, get_args

from cibl_ray.bundle.card import Bundle, open_bundle
from cibl_ray.bundle.targets import misfit
from pipelines.common.errors import CommandParser, UserError, run_command
from serve.haproxy import addresses, authority
from serve.settings import KEYS, Precision, ServiceConfig, check

# Flags of numbers and words that are fields of the settings, and have their meaning and default from there.
_FIELDS: dict[str, type] = {
    "threads": int,
    "max_batch": int,
    "max_queue": int,
    "max_bytes": int,
    "max_held_bytes": int,
    "max_images": int,
    "max_pixels": int,
    "max_request_pixels": int,
    "max_waiting_pixels": int,
    "max_connections": int,
    "max_connections_per_address": int,
    "idle_seconds": float,
    "body_seconds": float,
    "path_prefix": str,
}


def main() -> None:
    """Parse the command line, check everything that can be checked, then serve until a signal comes.

    Raises:
        UserError: An argument is wrong, or the service cannot start or continue.
    """
    arguments = _parser().parse_args()
    least, most = _replicas(arguments.replicas)
    args: dict[str, Any] = {
        "bundles": [str(path.absolute()) for path in arguments.bundles],
        "precision": arguments.precision[0],
        "more_precisions": arguments.precision[1:],
        "provider": arguments.provider,
        "replicas": least,
        "max_replicas": most if most > least else None,
        "keys_file": _absolute(arguments.keys),
        "access_log": _absolute(arguments.access_log),
        "cors": arguments.cors,
        "private_ports": not arguments.no_private_ports,
        "tls_certificate": _absolute(arguments.tls_certificate),
        "tls_key": _absolute(arguments.tls_key),
        **{name: getattr(arguments, name) for name in _FIELDS if getattr(arguments, name) is not None},
    }
    if arguments.formats:
        args["formats"] = [name.upper().replace("JPG", "JPEG") for name in arguments.formats]
    if arguments.trusted_proxies:
        args["trusted_proxies"] = arguments.trusted_proxies
    config = check(args)
    opened = [open_bundle(path) for path in arguments.bundles]
    for precision in config.precisions:
        names = _check_bundles(opened, precision, arguments.provider)
    _check_log(config.access_log)
    if not arguments.simple and importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")
    _free(arguments.host, arguments.port)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    where = f"{'https' if config.tls_certificate else 'http'}://{authority(arguments.host, arguments.port)}{config.path_prefix}"
    private = ipaddress.ip_address(addresses(arguments.host)[0]).is_loopback
    if not private and not (arguments.keys or os.environ.get(KEYS)):
        print(f"warning: everyone who reaches {where} may ask; --keys FILE asks for API keys", file=sys.stderr)

    def ready() -> None:
        if not ended.is_set():
            print(
                f"serving {', '.join(names)} ({', '.join(config.precisions)}) on {where}; {where}/docs lists the routes",
                flush=True,
            )

    if arguments.simple:
        from serve.simple import running as running_simple

        with running_simple(args, arguments.host, arguments.port) as server:
            ready()
            while not ended.wait(1):
                if not server.healthy:
                    raise UserError("a model's thread has ended; start the service again")
            print("answering what was asked, then ending", flush=True)
        return
    from serve.local import running

    with running(args, arguments.host, arguments.port, cancelled=ended) as service:
        ready()
        while not ended.wait(1):
            if service.problem is not None:
                raise UserError(service.problem)
        print("answering what was asked, then ending", flush=True)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m serve", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="folder written by python -m cibl_ray.export")
    parser.add_argument("--host", default="127.0.0.1", help="address or name to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--simple", action="store_true", help="one process under uvicorn, without Ray and HAProxy, for a small machine"
    )
    parser.add_argument("--replicas", default="1", help="processes that answer; MIN-MAX scales with the load (default: 1)")
    parser.add_argument(
        "--precision",
        type=_precisions,
        default=["fp32"],
        metavar="NAME[,NAME]",
        help="which of a bundle's models answers: fp32, fp16 or int8; requests may ask for those that follow (default: fp32)",
    )
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda", "tensorrt"], default="auto")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys, one a line; without it everyone may ask")
    parser.add_argument("--access-log", type=Path, metavar="FOLDER", help="JSON lines, one file for each replica")
    parser.add_argument(
        "--no-private-ports",
        action="store_true",
        help="leave the port of replicas as Ray opens it: on all interfaces",
    )
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM file; the port then speaks HTTPS")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file with the certificate's private key")
    parser.add_argument(
        "--cors", nargs="+", metavar="ORIGIN", default=[], help="pages of these origins may call the service; '*' allows all"
    )
    fields = ServiceConfig.model_fields
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help=_help("formats"))
    parser.add_argument("--trusted-proxies", nargs="+", metavar="ADDRESS", help=fields["trusted_proxies"].description)
    for name, kind in _FIELDS.items():
        letter = {int: "N", float: "SECONDS", str: "PATH"}[kind]
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=letter, help=_help(name))
    return parser


def _help(name: str) -> str:
    field = ServiceConfig.model_fields[name]
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    return f"{field.description} (default: {default or 'none'})"


def _absolute(path: Path | None) -> str | None:
    return str(path.absolute()) if path is not None else None


def _check_bundles(bundles: list[Bundle], precision: str, provider: str) -> list[str]:
    """The models' names. Raises UserError before anything is started."""
    names = [bundle.card.name for bundle in bundles]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two bundles have the name {twice!r}; export one under another: --name")
    for bundle in bundles:
        if precision not in bundle.models:
            made = ", ".join(bundle.models)
            raise UserError(f"{str(bundle.folder)!r} has no {precision} model; choose one that it has with --precision: {made}")
        # Replicas log it, where nobody looks.
        if precision == "int8" and provider in ("auto", "cpu") and (problem := misfit(bundle.card.source)):
            from cibl_ray.bundle.runtime import usable

            if provider == "cpu" or not usable("cuda"):
                print(f"warning: {str(bundle.models['int8'].path)!r} {problem}", file=sys.stderr)
    if provider in ("cuda", "tensorrt"):
        from cibl_ray.bundle.runtime import usable

        if not usable(provider):
            raise UserError(f"--provider {provider}: this machine or this onnxruntime has none; give --provider auto or cpu")
    return names


def _check_log(folder: Path | None) -> None:
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK | os.X_OK)
        except OSError as error:
            raise UserError(f"--access-log {str(folder)!r}: {error.strerror}; give another folder") from error
        if not writable:
            raise UserError(f"--access-log {str(folder)!r}: it cannot be written; give another folder")


def _precisions(text: str) -> list[str]:
    names = text.split(",")
    if not {*names} <= {*get_args(Precision)}:
        raise argparse.ArgumentTypeError(f"{text!r}: give {', '.join(get_args(Precision))}, or several as in fp32,int8")
    return names


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
    """Raise UserError if the port cannot be listened on."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: give one from 1 to 65535")
    for address in addresses(host):
        try:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {address}: {error}; choose another") from error


def command() -> NoReturn:
    """The console script `cibl-ray-serve`, which also works beside a file `serve.py`."""
    run_command(main, "'cibl-ray[serve]'")


if __name__ == "__main__":
    command()
