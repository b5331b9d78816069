"""What every benchmark shares: alternating rounds, medians, and the machine they ran on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from cibl_ray.hardware import cpu_name


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Run every side once a round, in turn, after one round of warm-up. A side returns how many units it did.

    Returns, by side: the median of units a second, and the lowest and highest round.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            units = run()
            rate = units / (time.perf_counter() - started)
            if number > 0:
                rates[name].append(rate)
    return {
        name: {"median": round(statistics.median(r), 2), "lowest": round(min(r), 2), "highest": round(max(r), 2)}
        for name, r in rates.items()
    }


def report(**content: object) -> None:
    """Print the result as one JSON object: the benchmark's last line."""
    print(json.dumps({**content, "machine": machine()}))


def machine() -> dict[str, object]:
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "python": platform.python_version(),
    }
