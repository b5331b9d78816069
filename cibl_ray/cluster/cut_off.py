"""What becomes of a process whose host can no longer reach the driver's."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

_CUT_OFF = 40.0  # seconds without an answer


@contextmanager
def end_when_cut_off(relay: Any) -> Iterator[None]:
    """Within the block, end this process when the driver's host has not answered for 40 seconds.

    By then Ray replaces it. A process that is cut off does not know that by itself, and waits for an answer for many minutes:
    in a collective, or in a report. Meanwhile it would keep the lock of the folder in which its successor works.

    Args:
        relay: The handle of a `Relay` on the driver's host.
    """
    ended = threading.Event()

    def watch() -> None:
        heard = time.monotonic()
        while not ended.wait(_CUT_OFF / 8):
            try:
                ray.get(relay.stop_asked.remote(), timeout=_CUT_OFF / 4)
                heard = time.monotonic()
            except RayError:
                if time.monotonic() - heard >= _CUT_OFF:
                    os._exit(1)  # an exception would not interrupt the wait

    threading.Thread(target=watch, name="cut_off", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
