"""`python -m benchmarks.wire [--images FOLDER]`: bytes a worker sends in a step, by method: from the formula and measured.

Two workers with gloo on this machine train some steps of ResNet-20 on CIFAR-10-LT; what goes through the loopback interface is
counted by the kernel, headers and acknowledgements included. The formula is docs/explanation/scaling.md's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import report
from cibl_ray.hardware import resolve
from cibl_ray.losses.objective import Images
from cibl_ray.training.trainer import Trainer
from cibl_ray.world import World
from pipelines.common.errors import run_command

LOSSES = {
    **{kind: f"{{kind: {kind}}}" for kind in ("cross_entropy", "balanced_softmax", "ldam", "psc", "hybrid_psc")},
    **{kind: f"{{kind: {kind}}}" for kind in ("supcon", "hybrid_sc", "bcl", "cibl")},
    "cibl, queue": "{kind: cibl, queue: 1024}",
    "cibl, queue, averaged keys": "{kind: cibl, queue: 1024, momentum: 0.99}",
    "paco": "{kind: paco}",
}
_OWN_ALONE = ("cross_entropy", "balanced_softmax", "ldam", "psc", "hybrid_psc")  # compare no embeddings with each other
_AVERAGED = ("cibl, queue, averaged keys", "paco")  # embed every view but the first by an averaged network
STEPS, BATCH, VIEWS, WIDTH = 10, 128, 2, 128


def formula(loss: str, parameters: int, workers: int, batch: int = BATCH, views: int = VIEWS, width: int = WIDTH) -> float:
    """Bytes that each worker sends in a step."""
    share = (workers - 1) / workers
    gradients, labels = 2 * share * 4 * parameters, share * 8 * batch
    embedding = share * 4 * batch * width  # a view of every sample, gathered
    if loss in _OWN_ALONE:
        return gradients + labels
    if loss in _AVERAGED:  # one view with a gradient, the others, and their labels, without
        return gradients + 2 * labels + 3 * embedding + (views - 1) * embedding
    return gradients + labels + 3 * views * embedding  # gathered, and gradients summed over the whole set


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        _work(arguments.images, arguments.rank, arguments.store, 1 if arguments.quick else STEPS)
        return
    with tempfile.TemporaryDirectory() as folder:
        images = ["--images", str(arguments.images)] if arguments.images else []
        images += ["--quick"] if arguments.quick else []
        command = [sys.executable, "-m", "benchmarks.wire", "--store", f"{folder}/store", *images]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        other = subprocess.Popen([*command, "--rank", "1"], env=environment)
        subprocess.run([*command, "--rank", "0"], env=environment, check=True)
        other.wait()


def _work(images: Path | None, rank: int, store: str, steps: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    world = World()
    bytes_: dict[str, dict[str, float]] = {}
    for name, loss in LOSSES.items():
        head = ("--head", "{kind: cosine}") if name == "ldam" else ()
        flags = (*head, "--backbone", "resnet20", "--loader.kind", "torch", "--device", "cpu")
        config, prepared = cifar10_lt(images, "--loss", loss, *flags)
        trainer = Trainer(resolve(config), prepared, Path(tempfile.gettempdir()), world)
        streams = []
        for loader in trainer.train_loaders:
            batch = next(iter(loader.epoch(0)))
            streams.append(Images(trainer.normalize(batch.views), batch.labels.clone(), batch.views.shape[1]))
        trainer.optimize(streams)
        dist.barrier()
        before = _sent()
        for _ in range(steps):
            trainer.optimize(streams)
        dist.barrier()
        parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
        measured = (_sent() - before) / steps / 2  # both workers' go through the one interface
        bytes_[name] = {"formula": round(formula(name, parameters, 2)), "measured": round(measured)}
        bytes_[name]["measured_over_formula"] = round(measured / bytes_[name]["formula"], 3)
    if world.is_rank0:
        report(bytes_per_worker_and_step=bytes_, batch=BATCH, views=VIEWS, workers=2)
    dist.barrier()
    dist.destroy_process_group()


def _sent() -> int:
    """Bytes that the loopback interface has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise RuntimeError("no loopback interface in /proc/net/dev")


if __name__ == "__main__":
    run_command(main)
