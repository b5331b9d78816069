"""How many CPUs this process may count on."""

from __future__ import annotations

import os

CORES = "CIBL_RAY_CORES"


def usable_cores() -> int:
    """The CPUs given to this process by `limit_cores` or, without that, those that the operating system lets it use."""
    return int(os.environ.get(CORES, 0)) or len(os.sched_getaffinity(0))


def limit_cores(count: int) -> None:
    """Tell loaders, here and in child processes, that other workers share this machine."""
    os.environ[CORES] = str(count)
