"""The choice of a loader: by the configuration, the plan, and what this machine has."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.common.words import plural
from pipelines.config import LoaderConfig, View
from pipelines.loaders.cache import available_memory, fits_into_memory, local_workers
from pipelines.loaders.cuts import draw_cuts, worker_weights
from pipelines.loaders.reading import Loader, ReadPlan
from pipelines.prepare.beton import PAGE, Beton
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)


def _resident(beton: Beton, views: Sequence[View], config: LoaderConfig, device: torch.device) -> bool:
    """Whether the images are to be held in the device's memory. Raises UserError where that is asked for and cannot be."""
    from pipelines.loaders.resident_loader import margin_of, why_not_resident

    margin = margin_of(views)

    if config.kind == "auto":
        # On the CPU FFCV's threads are as fast (benchmarks.resident); where it is absent, nothing else is.
        pays = device.type == "cuda" or importlib.util.find_spec("ffcv") is None
        return pays and config.part == "all" and why_not_resident(beton, device, margin) is None
    if config.kind == "resident" and (reason := why_not_resident(beton, device, margin)) is not None:
        raise UserError(f"loader.kind is 'resident', but {reason}; or set loader.kind: auto")
    return config.kind == "resident"


def loader_kind(config: LoaderConfig) -> Literal["ffcv", "torch"]:
    """Decide which loader `config` means on this machine.

    Raises:
        UserError: FFCV is asked for, and is not installed.
    """
    if config.kind == "torch":
        return "torch"
    if importlib.util.find_spec("ffcv") is not None:
        return "ffcv"
    if config.kind == "ffcv":
        raise UserError("loader.kind is 'ffcv', but FFCV is not installed: make setup says what it needs; or set it to 'auto'")
    return "torch"


def make_loader(
    prepared: Prepared, split: str, plan: ReadPlan, config: LoaderConfig, device: torch.device | None = None
) -> Loader:
    """Make a loader of one split of prepared data.

    Args:
        prepared: The data.
        split: 'train', 'val' or 'test'.
        plan: What to read of it.
        config: How it is read.
        device: Where training will want the batches; None: the CPU.

    Returns:
        The loader.

    Raises:
        UserError: The data cannot be read so.
    """
    files = None
    if plan.sampling == "weighted":
        prepared.require_weights(split)
    if plan.drop_last:
        config = decide_cache(prepared, split, config)
        if config.part == "shards" and plan.share.workers > 1:
            files, plan = _own_files(prepared, split, plan)
        if config.cache == "process":
            plan = replace(plan, group=_pages_ahead(config))
    beton = prepared.beton(split, files)
    if plan.drop_last and plan.batches(len(beton)) == 0:
        own = "" if files is None else f" in the files of worker {plan.share.worker} of {plan.share.workers}"
        raise UserError(
            f"the {split} split has {plural(len(beton), 'image')}{own}, fewer than one batch of {plan.batch_size}; "
            "lower train.batch_size"
        )
    device = device or torch.device("cpu")
    loader = _eval_loader(beton, plan, config) if plan.rule is not None else _train_loader(beton, plan, config, device)
    log.info("%s: %s images, %s", split, f"{loader.samples:,}", loader.name)
    return loader


def _eval_loader(beton: Beton, plan: ReadPlan, config: LoaderConfig) -> Loader:
    """The loader of evaluation. Whichever loader trains, it is this one: a machine that evaluates needs no FFCV."""
    from pipelines.loaders.eval_loader import EvalLoader

    return EvalLoader(beton, plan, config)


def _train_loader(beton: Beton, plan: ReadPlan, config: LoaderConfig, device: torch.device) -> Loader:
    kind = "resident" if _resident(beton, plan.views, config, device) else loader_kind(config)
    # An image that is too small for its cut is reported now.
    draw_cuts(plan.views, plan.size, beton.heights, beton.widths, plan.seed, 0)
    if kind == "resident":
        from pipelines.loaders.resident_loader import ResidentLoader

        return ResidentLoader(beton, plan, device)
    if kind == "ffcv":
        from pipelines.loaders.ffcv_loader import FFCVLoader

        return FFCVLoader(beton, plan, config)
    from pipelines.loaders.torch_loader import TorchLoader

    return TorchLoader(beton, plan, config, device)


def decide_cache(prepared: Prepared, split: str, config: LoaderConfig) -> LoaderConfig:
    """Decide cache 'auto' for this machine: by whether the split's files fit into its memory.

    Args:
        prepared: The data.
        split: The split that is read.
        config: The configuration.

    Returns:
        `config` with the decision.
    """
    if config.cache != "auto":
        return config
    size = prepared.splits[split].bytes
    if config.part == "shards":  # this machine's processes read their own files only
        size = size * local_workers() // int(os.environ.get("WORLD_SIZE", 1))
    fits = fits_into_memory(size)
    log.info(
        "%s: %s MB %s into the %.1f GB of memory that are free: cache %r",
        split,
        f"{size / 1e6:,.1f}",
        "fit" if fits else "do not fit",
        available_memory() / 1e9,
        "os" if fits else "process",
    )
    return config.model_copy(update={"cache": "os" if fits else "process"})


def _pages_ahead(config: LoaderConfig) -> int:
    """Pages in a group. Raises UserError where a machine's workers could not hold two groups each."""
    pages = max(1, (config.read_ahead_mb << 20) // PAGE)
    needed, free = 2 * pages * PAGE * local_workers(), available_memory()
    if needed > free:
        raise UserError(
            f"loader.read_ahead_mb {config.read_ahead_mb} takes {needed / 1e9:.1f} GB for {local_workers()} workers, of "
            f"{free / 1e9:.1f} GB that are free; lower it"
        )
    return pages


def _own_files(prepared: Prepared, split: str, plan: ReadPlan) -> tuple[list[int], ReadPlan]:
    """The numbers of the files that this worker reads, and its plan for them: as many batches as every other worker's."""
    shards, share = prepared.splits[split].shards, plan.share
    if len(shards) < share.workers:
        raise UserError(
            f"loader.part is 'shards', but the {split} split has {plural(len(shards), 'file')} for {share.workers} workers; "
            "set data.store.shard_mb lower, or loader.part: all"
        )
    images = range(plan.batch_size)
    images_per_step = [len(images[share.of(len(images), worker)]) for worker in range(share.workers)]
    batches = [
        sum(shard.samples for shard in shards[worker :: share.workers]) // count for worker, count in enumerate(images_per_step)
    ]
    total, taken = sum(shard.samples for shard in shards), min(batches) * plan.batch_size
    log.info(
        "%s: each worker takes %d batches from its own files; an epoch shows %s of %s images (%.1f %%)",
        split,
        min(batches),
        f"{taken:,}",
        f"{total:,}",
        100 * taken / total,
    )
    # Position decides a draw, and every worker counts its own: each needs draws of its own.
    seed = int(stream(plan.seed, "part", share.worker).integers(2**32))
    files = list(range(share.worker, len(shards), share.workers))
    weights = _own_weights(prepared, split, plan, images_per_step)
    return files, replace(plan, seed=seed, part_batches=min(batches), weights=weights)


def _own_weights(prepared: Prepared, split: str, plan: ReadPlan, images_per_step: list[int]) -> tuple[float, ...] | None:
    """How often this worker draws each class, so that all together draw each as often as the sampling says.

    images_per_step: of each worker.
    """
    if plan.sampling is None or plan.sampling == "instance":
        return None
    share = plan.share
    weighted = plan.sampling == "weighted"
    of_files = np.array(prepared.splits[split].shard_weights) if weighted else prepared.shard_counts(split)
    counts = np.stack([of_files[worker :: share.workers].sum(0) for worker in range(share.workers)])
    if not counts.sum(1).all():
        raise UserError(
            f"data.sampling is 'weighted', but all images in the files of worker {int(counts.sum(1).argmin())} of "
            f"{share.workers} have weight 0; use fewer workers, or set loader.part: all"
        )
    drawn, got = worker_weights(counts, plan.sampling, images_per_step)
    worst = int(np.abs(got - 1).argmax())
    if abs(got[worst] - 1) > 0.01:
        log.warning(
            "%s: classes lie so unevenly over the files that class %r is drawn %.2f times as often as data.sampling %r says; "
            "use fewer workers, or loader.part: all",
            split,
            prepared.classes[worst],
            got[worst],
            plan.sampling,
        )
    return tuple(drawn[share.worker].tolist())
