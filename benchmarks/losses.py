"""`python -m benchmarks.losses [--quick] [--images FOLDER]`: contrastive losses against their plain formulations.

The peers are the matrix formulations of the public implementations, written here from the formulas: similarities, masks, a
softmax over the whole matrix, all of it held for autograd. They take the same tensors, and the same threads. Memory is the peak
of what autograd keeps and computes, by torch's profiler. Then one CIBL step beside one cross-entropy step: ResNet-32, the same
views, the trainer's own step.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import alternate, report
from cibl_ray.hardware import resolve
from cibl_ray.losses.bcl import balanced_contrastive
from cibl_ray.losses.cibl import cibl
from cibl_ray.losses.inputs import ContrastSet
from cibl_ray.losses.objective import Images
from cibl_ray.losses.paco import paco
from cibl_ray.losses.pairs.softmax import KEEP
from cibl_ray.losses.psc import psc
from cibl_ray.losses.supcon import supcon
from cibl_ray.training.trainer import Trainer
from pipelines.common.errors import run_command

SIZES = ((256, 128, 100), (512, 128, 1000), (4096, 128, 1000))  # M, d, C
TEMPERATURE, TAIL_SKEW, ALPHA, BETA = 0.1, 0.05, 0.05, 1.0


def plain_supcon(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As SupContrast writes it: shifted similarities, a mask of the others, a mask of the positives."""
    return _plain_supcon(z, labels)[0]


def _plain_supcon(z: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    similarity = z @ z.T / TEMPERATURE
    similarity = similarity - similarity.amax(1, keepdim=True).detach()
    others = 1 - torch.eye(len(z), device=z.device)
    positives = (labels[:, None] == labels[None]).float() * others
    log_probability = similarity - (similarity.exp() * others).sum(1, keepdim=True).log()
    count = positives.sum(1)
    return -(positives * log_probability).sum(1) / count.clamp(min=1), count


def plain_psc(z: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    similarity = z @ prototypes.T / TEMPERATURE
    similarity = similarity - similarity.amax(1, keepdim=True).detach()
    own = F.one_hot(labels, len(prototypes)).float()
    return -((similarity * own).sum(1) - (similarity.exp() * (1 - own)).sum(1).log())


def plain_bcl(z: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """As BCL writes it: prototypes among the columns, each column's exponential divided by its class's members."""
    classes = len(prototypes)
    everyone = torch.cat((z, prototypes))
    all_labels = torch.cat((labels, torch.arange(classes, device=z.device)))
    members = torch.bincount(all_labels, minlength=classes).float()
    others = 1 - torch.eye(len(z), len(everyone), device=z.device)
    positives = (labels[:, None] == all_labels[None]).float() * others
    similarity = z @ everyone.T / TEMPERATURE
    similarity = similarity - similarity.amax(1, keepdim=True).detach()
    per_column = members[all_labels][None] - positives
    normalizer = (similarity.exp() * others / per_column).sum(1, keepdim=True)
    return -(positives * (similarity - normalizer.log())).sum(1) / positives.sum(1)


def plain_paco(logits: torch.Tensor, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As PaCo writes it: class logits and similarities side by side in one softmax."""
    others = 1 - torch.eye(len(z), device=z.device)
    positives = (labels[:, None] == labels[None]).float() * others
    joint = torch.cat((logits, z @ z.T / TEMPERATURE), 1)
    joint = joint - joint.amax(1, keepdim=True).detach()
    counted = torch.cat((torch.ones_like(logits), others), 1)
    weights = torch.cat((BETA * F.one_hot(labels, logits.shape[1]), ALPHA * positives), 1)
    log_probability = joint - (joint.exp() * counted).sum(1, keepdim=True).log()
    return -(weights * log_probability).sum(1) / weights.sum(1)


def plain_cibl(logits: torch.Tensor, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    contrastive, positives = _plain_supcon(z, labels)
    weight = TAIL_SKEW * positives / (1 + TAIL_SKEW * positives)
    return (1 - weight) * F.cross_entropy(logits, labels, reduction="none") + weight * contrastive


Pair = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]


def pairs(labels: torch.Tensor, classes: int) -> dict[str, Pair]:
    """(ours, plain) of each loss, on embeddings z, logits and prototypes."""
    return {
        "supcon": (
            lambda z, f, p: supcon(z, labels, ContrastSet(z, labels), classes, TEMPERATURE).mean(),
            lambda z, f, p: plain_supcon(z, labels).mean(),
        ),
        "psc": (
            lambda z, f, p: psc(z, labels, p, TEMPERATURE).mean(),
            lambda z, f, p: plain_psc(z, labels, p).mean(),
        ),
        "bcl": (
            lambda z, f, p: balanced_contrastive(z, labels, ContrastSet(z, labels), p, TEMPERATURE).mean(),
            lambda z, f, p: plain_bcl(z, labels, p).mean(),
        ),
        "paco": (
            lambda z, f, p: paco(f, z, labels, ContrastSet(z, labels), TEMPERATURE, ALPHA, BETA)["loss"],
            lambda z, f, p: plain_paco(f, z, labels).mean(),
        ),
        "cibl": (
            lambda z, f, p: cibl(f, z, labels, ContrastSet(z, labels), TAIL_SKEW, TEMPERATURE)["loss"],
            lambda z, f, p: plain_cibl(f, z, labels).mean(),
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--no-step", action="store_true", help="leave out the training step, which needs CIFAR-10")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ratios, spread, milliseconds, megabytes = {}, {}, {}, {}
    # A training process has freed large activations, after which glibc keeps blocks below 32 MB instead of handing them back;
    # without that, either side pays at random for fresh pages. The plain matrices at M = 4096 are larger, there as in training.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    for size, width, classes in SIZES:
        labels, leaves = _example(size, width, classes, device)
        losses = pairs(labels, classes)
        sides = {}
        for name, (ours, plain) in losses.items():
            values = [loss(*leaves).item() for loss in (ours, plain)]
            assert abs(values[0] - values[1]) < 1e-3 * abs(values[1]) + 1e-4, (name, size, values)
            for side, loss in (("ours", ours), ("plain", plain)):
                sides[f"{name} {side}"] = _repeat(partial(_gradients, loss, leaves), size, arguments.quick)
        # All losses take turns, so that a disturbance of the machine is spread over them.
        rates = alternate(sides, 2 if arguments.quick else 11 if size > 1000 else 21)
        for name, (ours, plain) in losses.items():
            key, two = f"{name}_{size}", {side: rates[f"{name} {side}"]["median"] for side in ("ours", "plain")}
            milliseconds[key] = {side: round(1000 / rate, 3) for side, rate in two.items()}
            megabytes[key] = {
                side: round(peak_bytes(loss, leaves) / 2**20, 1) for side, loss in (("ours", ours), ("plain", plain))
            }
            ratios[key] = round(two["ours"] / two["plain"], 2)
            slowest, fastest = (rates[f"{name} ours"][end] / rates[f"{name} plain"][end] for end in ("lowest", "highest"))
            spread[key] = [round(slowest, 2), round(fastest, 2)]
    # Beyond the threshold, memory at twice the batch over that at it: 2 where it grows like M, 4 like M².
    beyond = 2 * math.isqrt(KEEP[device])
    held = []
    for rows in (beyond, 2 * beyond):
        labels, leaves = _example(rows, width, classes, device)
        held.append({name: peak_bytes(ours, leaves) for name, (ours, _) in pairs(labels, classes).items()})
    growth = {name: round(held[1][name] / held[0][name], 2) for name in held[0]}
    if not arguments.no_step:
        ratios["cibl_step_over_ce_step"] = _step_ratio(arguments.images, arguments.quick)
    report(
        milliseconds=milliseconds,
        peak_megabytes=megabytes,
        memory_growth={f"{beyond}_to_{2 * beyond}": growth},
        sizes=SIZES,
        ratios_of_slowest_and_fastest_rounds=spread,
        ratios=ratios,
    )


def _example(size: int, width: int, classes: int, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Labels of a long tail, imbalance 100; and embeddings, logits and prototypes, to differentiate by."""
    random = torch.Generator().manual_seed(0)
    frequency = 0.01 ** (torch.arange(classes) / (classes - 1))
    labels = torch.multinomial(frequency, size, replacement=True, generator=random).to(device)
    tensors = [
        F.normalize(torch.randn(size, width, generator=random), dim=1),
        torch.randn(size, classes, generator=random),
        F.normalize(torch.randn(classes, width, generator=random), dim=1),
    ]
    return labels, [tensor.to(device).requires_grad_() for tensor in tensors]


def _gradients(loss: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> object:
    return torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)


def _repeat(work: Callable[[], object], size: int, quick: bool) -> Callable[[], int]:
    # In a turn the first few find the cache full of the other sides: so many that this is a few percent.
    repeats = max(3, 400 * 256**2 // size**2) // (3 if quick else 1)

    def run() -> int:
        for _ in range(repeats):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return repeats

    return run


def peak_bytes(loss: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> float:
    """The most bytes held at a time by one forward and backward, the leaves aside."""
    if leaves[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _gradients(loss, leaves)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _gradients(loss, leaves)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def _step_ratio(images: Path | None, quick: bool) -> float:
    """Seconds of a CIBL step over those of a cross-entropy step: ResNet-32, batch 128, two views; the two take turns."""
    trainers = {}
    for kind in ("cibl", "cross_entropy"):
        config, prepared = cifar10_lt(images, "--loss.kind", kind)
        trainers[kind] = Trainer(resolve(config), prepared, Path(tempfile.gettempdir()))
    trainer = trainers["cibl"]
    batch = next(iter(trainer.train_loaders[0].epoch(0)))
    ready = [
        Images(trainer.normalize(batch.views.to(trainer.device)), batch.labels.clone().to(trainer.device), batch.views.shape[1])
    ]
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    for _ in range(6 if quick else 40):  # a step at a time, so that both see the same machine
        for kind, one in trainers.items():
            started = time.perf_counter()
            one.optimize(ready)["loss"].item()
            seconds[kind].append(time.perf_counter() - started)
    return round(statistics.median(seconds["cibl"][2:]) / statistics.median(seconds["cross_entropy"][2:]), 3)


if __name__ == "__main__":
    run_command(main)
