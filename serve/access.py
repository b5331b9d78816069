"""One JSON object a request, escaped by JSON, so that nothing a client sends forges a line."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from serve.request import Request

_LARGEST, _KEPT = 64 << 20, 5


class AccessLog:
    """Lines in `FOLDER/access-HOST-PID.jsonl`. A file of 64 MiB makes room for a new one; five are kept."""

    def __init__(self, folder: Path | None) -> None:
        """Open the file.

        Args:
            folder: For the files; None: nothing is written.

        Raises:
            UserError: It cannot be written.
        """
        self._file: RotatingFileHandler | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Hosts, and containers above all, have processes of the same number, and may share the folder.
            path = folder / f"access-{socket.gethostname()}-{os.getpid()}.jsonl"
            self._file = RotatingFileHandler(path, maxBytes=_LARGEST, backupCount=_KEPT)
        except OSError as error:
            raise UserError(f"access_log {str(folder)!r} cannot be written: {error.strerror}; give another folder") from error

    @property
    def open(self) -> bool:
        """Whether lines are written."""
        return self._file is not None

    def write(self, request: Request, route: str, status: int, seconds: float, facts: dict[str, Any]) -> None:
        """Write the line of one request.

        Args:
            request: The request.
            route: Its name in the metrics.
            status: Of the answer; 499 if the client has gone.
            seconds: From its head to its answer.
            facts: More fields.
        """
        if self._file is None:
            return
        line = {
            "time": round(time.time(), 3),
            "request_id": request.id,
            "client": request.client,
            "method": request.method[:16],
            "path": request.path[:256],
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 2),
            "bytes_in": request.bytes_in,
            **facts,
        }
        self._file.emit(logging.LogRecord("access", logging.INFO, "", 0, json.dumps(line), None, None))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
