"""What a run costs: multiply-adds, passes, PFLOP."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cibl_ray.config import RunConfig
from cibl_ray.networks.network import build_network
from cibl_ray.training.passes import Passes


def multiply_adds(config: RunConfig, classes: int) -> int:
    """Multiply-adds of one image through the network that classifies, as convolutions and products have them."""
    return _multiply_adds(config.network.model_dump_json(), config.data.size, classes)


@cache
def _multiply_adds(network: str, size: int, classes: int) -> int:
    from cibl_ray.networks.config import Needs, NetworkConfig

    built = build_network(NetworkConfig.model_validate_json(network), classes, Needs(), seed=0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built.classify(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def pflop(of: Passes, multiply_adds: int) -> float:
    """10^15 floating-point operations of so many passes: two a multiply-add, and two forward passes' worth for the backward."""
    return 2 * multiply_adds * (3 * of.trained + of.forward) / 1e15


def cost(result: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """What a line says of its run's cost; nothing for a run of an earlier version, which did not count its passes."""
    if "passes" not in result:
        return {}
    of, work = Passes(**result["passes"]), multiply_adds(config, len(result["classes"]))
    return {
        "passes": of.trained,
        "forward_passes": of.forward,
        "pflop": round(pflop(of, work), 4),
        "parameters": result["parameters"],
        "multiply_adds": work,
    }
