"""One JSON object a request, escaped by JSON, so that nothing a client sends forges a line."""

from __future__ import annotations

import json
import logging
import os
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from serve.request import Request

_LARGEST, _KEPT = 64 << 20, 5


class AccessLog:
    """Lines in `FOLDER/access-PID.jsonl`, in turn with up to five older files; nothing without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._file: RotatingFileHandler | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RotatingFileHandler(folder / f"access-{os.getpid()}.jsonl", maxBytes=_LARGEST, backupCount=_KEPT)

    def write(self, request: Request, route: str, status: int, seconds: float, facts: dict[str, Any]) -> None:
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
        if self._file is not None:
            self._file.close()
