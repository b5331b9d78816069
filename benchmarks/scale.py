"""`python -m benchmarks.scale [--quick]`: what several workers gain, over a network that is as slow as a real one.

Two workers run in two network namespaces of this machine, joined by a veth pair whose rate `tc` limits (needs root, Linux and
iproute2). A step is a whole one: CIBL's forward and backward pass on random images, the exchange, SGD. The sides take turns:
no exchange; one sum after the backward pass; buckets within it; the same in bfloat16; DistributedDataParallel with buckets of
25 MB and 1 MB. Bytes are counted by the kernel, headers included. The formulas are docs/explanation/scaling.md's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import wire
from benchmarks.measure import report
from cibl_ray.config import load_config
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.network import HybridNetwork, Outputs, build_network
from cibl_ray.training.exchange import BUCKET_BYTES, GradientExchange
from cibl_ray.training.optimizer import make_optimizer
from cibl_ray.world import World
from pipelines.common.errors import UserError, run_command

WORKERS, VIEWS = 2, 2
RATES = {"1gbit": 1e9, "100mbit": 1e8}  # bit/s
FREE = "free"  # no limit: what the exchange costs the CPU
PAYLOAD = 1448 / 1514  # of an Ethernet frame on a link of 1,500 bytes: the rest are headers
SIDES = ("none", "sum", "overlap", "overlap_bf16", "ddp_25mb", "ddp_1mb")


@dataclass(frozen=True)
class Size:
    """A network and its step.

    Attributes:
        config: The configuration that it is taken from, and what differs.
        pixels: A side of an image.
        images: Of a worker in a step, each in two views.
        classes: C.
    """

    config: list[str]
    pixels: int
    images: int
    classes: int


SIZES = {"resnet50": Size(["imagenet_lt"], 64, 8, 1000), "resnet20": Size(["cifar10_lt", "--backbone", "resnet20"], 32, 32, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a minute: one round, of the small network alone")
    parser.add_argument("--rounds", type=int, help="how often each side is timed, after one round of warm-up (3, quick: 1)")
    parser.add_argument("--buckets", help="sizes of buckets in KiB to compare instead of the sides, separated by commas")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    buckets = [int(size) for size in arguments.buckets.split(",")] if arguments.buckets else []
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    if arguments.rank is not None:
        _work(arguments.rank, SIZES[arguments.size], arguments.folder, rounds, buckets)
        return
    sizes = ["resnet20"] if arguments.quick else [*SIZES]
    measured: dict[str, dict[str, Any]] = {}
    with two_hosts() as hosts:
        for size in sizes:
            for rate in (FREE, *RATES):
                hosts.limit(rate)
                measured.setdefault(size, {})[rate] = _run(hosts, size, rounds, buckets)
                print(size, rate, json.dumps(measured[size][rate]["ms"]), file=sys.stderr, flush=True)
    if buckets:
        report(ms_a_step={size: {rate: found["ms"] for rate, found in rates.items()} for size, rates in measured.items()})
        return
    _report(measured)


class Hosts:
    """Two network namespaces that see each other alone."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.interface = "veth0"  # of each

    def limit(self, rate: str) -> None:
        """Limit what each side sends."""
        for name in self.names:
            subprocess.run(
                ["ip", "netns", "exec", name, "tc", "qdisc", "del", "dev", self.interface, "root"], capture_output=True
            )
            if rate != FREE:
                # A burst of 256 kB is 2 ms of 1 Gbit/s; the queue is long enough that nothing is dropped.
                bucket = ["tbf", "rate", rate, "burst", "256kb", "limit", "16mb"]
                _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", self.interface, "root", *bucket)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two namespaces and remove them at the end.

    Raises:
        UserError: They cannot be made here.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing or not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise UserError("benchmarks.scale makes two network namespaces: run it as root on Linux, with iproute2 installed")
    names = [f"cibl_scale_{os.getpid()}_{side}" for side in "ab"]
    hosts = Hosts(names)
    ends = [f"cs{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            _ip("link", "set", end, "netns", name, "name", hosts.interface)
            _ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", hosts.interface)
            for interface in ("lo", hosts.interface):
                _ip("-n", name, "link", "set", interface, "up")
        yield hosts
    finally:
        for name in names:  # and with it its end of the pair
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"ip {' '.join(arguments)}: {done.stderr.strip()}; benchmarks.scale needs network namespaces and veth")


def _run(hosts: Hosts, size: str, rounds: int, buckets: list[int]) -> dict[str, Any]:
    """Time the sides between the two hosts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.scale", "--size", size, "--folder", folder, "--rounds", str(rounds)]
        command += ["--buckets", ",".join(map(str, buckets))] if buckets else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": hosts.interface}
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank, name in enumerate(hosts.names):
                inside = ["ip", "netns", "exec", name, *command, "--rank", str(rank)]
                workers.append(subprocess.Popen(inside, env=environment))
            for worker in workers:
                if worker.wait():
                    raise RuntimeError(f"a worker ended with status {worker.returncode}")
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        content: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        return content


def _work(rank: int, size: Size, folder: Path, rounds: int, buckets: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORKERS), rank=rank, world_size=WORKERS)
    world = World()
    sides = _sides(size, world, buckets)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    sent: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, step in sides.items():
            dist.barrier()
            before, begun = _sent(), time.perf_counter()
            step()
            if name != "none":
                dist.barrier()
            if number > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
            sent[name] = _sent() - before
    parts = _parts(size) if not buckets else {}
    dist.barrier()
    if world.is_rank0:
        result = {
            "ms": {name: round(1000 * statistics.median(each), 1) for name, each in seconds.items()},
            "bytes": sent,
            "parameters": sum(parameter.numel() for parameter in _network(size).parameters()),
            "last_bucket": GradientExchange(_network(size).parameters(), world).bucket_bytes[-1],
            **parts,
        }
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _network(size: Size) -> HybridNetwork:
    config = load_config(size.config[0], size.config[1:])
    return build_network(config.network, size.classes, config.loss.needs, 0).train()


def _sides(size: Size, world: World, buckets: list[int]) -> dict[str, Callable[[], None]]:
    """A step of each way to exchange gradients."""
    network = _network(size)
    own = {"none": None, "sum": GradientExchange(network.parameters(), world, bucket_bytes=2**40)}
    if buckets:
        own |= {f"{kib} KiB": GradientExchange(network.parameters(), world, kib * 1024) for kib in buckets}
        return {name: _step(size, network, network, world, exchange) for name, exchange in own.items()}
    own["overlap"] = GradientExchange(network.parameters(), world)
    own["overlap_bf16"] = GradientExchange(network.parameters(), world, wire=torch.bfloat16)
    steps = {name: _step(size, network, network, world, exchange) for name, exchange in own.items()}
    for name, megabytes in (("ddp_25mb", 25), ("ddp_1mb", 1)):
        inner = copy.deepcopy(network)
        wrapped = DistributedDataParallel(
            inner, bucket_cap_mb=megabytes, forward_sync_buffers=False, process_group=world.gradient_group
        )
        steps[name] = _step(size, inner, wrapped, world, None)
    return steps


def _step(
    size: Size, network: HybridNetwork, called: nn.Module, world: World, exchange: GradientExchange | None
) -> Callable[[], None]:
    config = load_config(size.config[0], size.config[1:])
    # "none" trains alone: it exchanges no embeddings either.
    alone = exchange is None and called is network
    world = World(alone=True) if alone else world
    batch = size.images * world.size
    objective = Objective(config.loss, network, np.ones(size.classes, np.int64), torch.device("cpu"), world, batch)
    optimizer = make_optimizer(network, config.optimizer, fused=False)
    random = torch.Generator().manual_seed(world.rank)
    pixels = torch.randn(size.images * VIEWS, 3, size.pixels, size.pixels, generator=random)
    pixels = pixels.to(memory_format=torch.channels_last)
    images = Images(pixels, torch.randint(10, (size.images,), generator=random), VIEWS)
    scale = world.size if called is not network else 1  # DistributedDataParallel divides by the workers

    def run(_: nn.Module, pixels: torch.Tensor) -> Outputs:
        outputs: Outputs = called(pixels)
        return outputs

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = objective(network, run, [images], 0.0)["loss"] * world.fraction(batch) * scale
        with exchange.summing() if exchange is not None else nullcontext():
            loss.backward()
        optimizer.step()

    return step


def _parts(size: Size) -> dict[str, float]:
    """The forward pass's seconds in a step of one worker, both computing at once."""
    network = _network(size)
    pixels = torch.randn(size.images * VIEWS, 3, size.pixels, size.pixels).to(memory_format=torch.channels_last)
    seconds = []
    for _ in range(3):
        dist.barrier()
        begun = time.perf_counter()
        network(pixels)
        seconds.append(time.perf_counter() - begun)
    return {"forward_ms": round(1000 * min(seconds[1:]), 1)}


def _sent() -> int:
    """Bytes that this host has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "veth0":
            return int(counts.split()[8])
    raise RuntimeError("no interface veth0 in /proc/net/dev")


@dataclass(frozen=True)
class Model:
    """Seconds of a step, from what a worker alone needs and what it sends.

    Attributes:
        compute: Seconds of a step without an exchange.
        forward: Of them, the forward pass.
        handling: Seconds that the exchange keeps the worker itself busy: copies, sums, calls.
        gradients: Bytes of gradients that a worker sends.
        embeddings: Bytes of everything else, which the backward pass waits for.
        last: Bytes of the last bucket, which is full when the backward pass ends.
    """

    compute: float
    forward: float
    handling: float
    gradients: float
    embeddings: float
    last: float

    def after(self, rate: float) -> float:
        """Where gradients are summed after the backward pass; rate: bytes a second."""
        return self.compute + self.handling + (self.embeddings + self.gradients) / rate

    def within(self, rate: float) -> float:
        """Where they are summed while it runs: the slower of worker and network decides."""
        worker = self.compute + self.handling + (self.embeddings + self.last) / rate
        network = self.forward + self.handling + (self.embeddings + self.gradients) / rate
        return max(worker, network)


def efficiencies(workers: int, node: int = 8) -> dict[str, float]:
    """The share of a GPU's own speed that `workers` GPUs keep, with the assumptions of docs/explanation/scaling.md.

    Args:
        workers: GPUs.
        node: GPUs of a node.
    """
    parameters, images, width, compute, start = 30_000_000, 64, 128, 0.0474, 0.0005
    batch = workers * images
    share = (workers - 1) / workers
    whole = wire.formula("cibl", parameters, workers, batch, VIEWS, width)
    gradients = 2 * share * 4 * parameters
    last = gradients * BUCKET_BYTES / (4 * parameters)
    model = Model(compute, compute / 3, start, gradients, whole - gradients, last)
    found: dict[str, float] = {}
    for name, rate in (("fast", 400e9), ("slow", 400e9 if workers <= node else 12.5e9)):
        found |= {f"{name}, after": compute / model.after(rate), f"{name}, within": compute / model.within(rate)}
    return found


def _report(measured: dict[str, dict[str, Any]]) -> None:
    images_per_s: dict[str, Any] = {}
    bytes_: dict[str, Any] = {}
    predicted: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name, rates in measured.items():
        size, parameters = SIZES[name], rates[FREE]["parameters"]
        whole = wire.formula("cibl", parameters, WORKERS, size.images * WORKERS, VIEWS)
        gradients = wire.formula("cross_entropy", parameters, WORKERS, 0)
        all_images = size.images * WORKERS
        images_per_s[name] = {
            rate: {side: round(1000 * all_images / ms, 1) for side, ms in found["ms"].items()} for rate, found in rates.items()
        }
        sent = rates[FREE]["bytes"]
        bytes_[name] = {"formula": round(whole), **{side: sent[side] for side in SIDES if side != "none"}}
        bytes_[name]["overlap_over_formula"] = round(sent["overlap"] / whole, 3)
        predicted[name] = {}
        for rate, bits in RATES.items():
            ms, speed = rates[rate]["ms"], bits / 8 * PAYLOAD
            model = Model(
                compute=ms["none"] / 1000,
                forward=rates[FREE]["forward_ms"] / 1000,
                handling=max(0.0, rates[FREE]["ms"]["sum"] - rates[FREE]["ms"]["none"]) / 1000,
                gradients=gradients,
                embeddings=whole - gradients,
                last=rates[FREE]["last_bucket"],
            )
            for side, seconds in (("sum", model.after(speed)), ("overlap", model.within(speed))):
                predicted[name][f"{side}, {rate}"] = round(1000 * seconds / ms[side], 3)
            ratios[f"overlap_over_sum_{rate}_{name}"] = round(ms["sum"] / ms["overlap"], 3)
            ratios[f"overlap_over_ddp_{rate}_{name}"] = round(min(ms["ddp_25mb"], ms["ddp_1mb"]) / ms["overlap"], 3)
    largest = next(iter(measured))
    ratios = {"overlap_over_sum_1gbit": ratios[f"overlap_over_sum_1gbit_{largest}"], **ratios}
    report(
        ms_a_step={name: {rate: found["ms"] for rate, found in rates.items()} for name, rates in measured.items()},
        images_per_s=images_per_s,
        bytes_per_worker_and_step=bytes_,
        predicted_over_measured=predicted,
        efficiency={
            workers: {name: round(share, 3) for name, share in efficiencies(workers).items()} for workers in (8, 64, 256)
        },
        ratios=ratios,
    )


if __name__ == "__main__":
    run_command(main)
