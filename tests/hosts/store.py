"""`python -m tests.hosts.store ADDRESS PORT FILE`: moto's S3 server, which answers 500 as long as FILE exists."""

import sys
from pathlib import Path

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


def main(address: str, port: str, failing: str) -> None:
    served, file = DomainDispatcherApplication(create_backend_app), Path(failing)

    def application(environ, respond):
        if file.exists():
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            respond("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return served(environ, respond)

    print("serving", flush=True)
    run_simple(address, int(port), application, threaded=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
