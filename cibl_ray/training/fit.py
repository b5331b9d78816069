"""One run, from its start or its last checkpoint to its result."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cibl_ray.config import RunConfig, TrainConfig, load_config, save_config
from cibl_ray.config_warnings import config_warnings
from cibl_ray.hardware import resolve
from cibl_ray.run.checkpoint import Checkpoint, find_newest
from cibl_ray.run.folder import (
    CHECKPOINTS,
    CONFIG,
    HISTOGRAM,
    LOG,
    RESULT,
    RESULT_BEFORE,
    copy_of,
    lock_folder,
    make_room,
    need_new,
    need_old,
    resume_command,
)
from cibl_ray.run.images import keep_images
from cibl_ray.run.log import read_metrics
from cibl_ray.run.mend import mend
from cibl_ray.run.progress import Progress, messages_to
from cibl_ray.run.stop import Stop
from cibl_ray.tracking.base import Status
from cibl_ray.tracking.trackers import track_run
from cibl_ray.training.arithmetic import decide
from cibl_ray.training.folds import cross_validate, few_validation_images, folds_of
from cibl_ray.training.report import Finished, outcome, print_report, result_content, save_pictures
from cibl_ray.training.resume import changes
from cibl_ray.training.schedules import lr_factor
from cibl_ray.training.trainer import Trainer
from cibl_ray.world import PeerLostError, World, require_own_gpu
from pipelines.common.errors import Interrupted, UserError
from pipelines.common.files import write_atomically
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.pictures import save_histogram
from pipelines.prepare.prepared import Prepared

log = logging.getLogger("cibl_ray")


def fit(
    config: RunConfig,
    folder: Path,
    resume: bool,
    world: World,
    progress: Progress,
    after_save: Callable[[], None] | None = None,
    patience: float = 0,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train a run from its start, or from its last checkpoint, to its result. Every worker calls it; only rank 0 writes.

    Args:
        config: The run's configuration.
        folder: The run folder: a new one, or with `resume` an earlier run's.
        resume: Whether to continue an earlier run.
        world: The workers.
        progress: Shows the progress.
        after_save: Rank 0 calls it after each checkpoint and after the result, to keep a copy of the folder.
        patience: Seconds to wait for another process in the folder. The process of a lost worker may end after it is replaced.
        stop: Asks the run to stop; None: nothing does.

    Returns:
        The content of result.json on rank 0; elsewhere an empty dict.

    Raises:
        UserError: The run cannot start, or its loss is not finite.
        Interrupted: `stop` asked for it, and a checkpoint is saved.
    """
    with messages_to(progress.log_handler()) if world.is_rank0 else nullcontext():
        return _prepare_and_fit(config, folder, resume, world, progress, after_save, patience, stop or Stop())


def _prepare_and_fit(
    config: RunConfig,
    folder: Path,
    resume: bool,
    world: World,
    progress: Progress,
    after_save: Callable[[], None] | None,
    patience: float,
    stop: Stop,
) -> dict[str, Any]:
    asked = config.train
    config = world.broadcast_from_rank0(lambda: resolve(config))
    require_own_gpu(config.train.device)
    world.broadcast_from_rank0(lambda: need_old(folder) if resume else need_new(folder))
    prepared = ensure_prepared(config.data, config.seed)
    _same_data(world, prepared)
    folds_of(config, prepared)  # refused before anything is written
    if world.is_rank0:
        copy = copy_of(folder)
        if copy is not None and after_save is None:
            log.warning("its copy %s is not brought up to date; --resume %s --cluster does that", copy, folder)
    damaged: list[Path] = []

    def find() -> Checkpoint | None:
        found = find_newest(folder / CHECKPOINTS)
        damaged.extend(found.damaged)
        return found.checkpoint

    checkpoint = world.broadcast_from_rank0(find) if resume else None
    if checkpoint is not None and config.loader.cache == "auto":
        # Chosen when the run began: another order of images would not fit the checkpoint's epoch.
        loader = config.loader.model_copy(update={"cache": checkpoint.config.loader.cache})
        config = config.model_copy(update={"loader": loader})
    earlier = world.broadcast_from_rank0(lambda: _earlier_config(folder, checkpoint)) if resume else None
    if earlier is not None:
        config = _as_decided(config, asked, earlier.train)
    else:
        steps = prepared.splits["train"].samples // config.train.batch_size
        config = world.broadcast_from_rank0(lambda: decide(config, asked, steps, len(prepared.classes), world.size))
    trainer = Trainer(config, prepared, folder, world, resume_from=checkpoint, stop=stop)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if not world.is_rank0:
        try:
            return trainer.fit(progress)
        except (KeyboardInterrupt, PeerLostError) as error:
            if isinstance(error, PeerLostError) and not stop.asked():
                raise
            raise Interrupted("stopped", stop.status) from None  # rank 0 has saved, and says how to resume
    # All checks are done: a mistake leaves no folder, and changes no earlier run.
    try:
        folder.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as error:
        raise UserError(
            f"run folder {str(folder)!r} was just made by another process; choose another name (--name, in Python name=)"
        ) from error
    with lock_folder(folder, "training", max(patience, 30 if world.size > 1 else 0)):
        try:
            if after_save is not None:
                trainer.after_save = after_save
            make_room(folder)
            with messages_to(logging.FileHandler(folder / LOG)):
                if resume:
                    mend(folder, checkpoint is not None, damaged)
                trains = trainer.epoch < config.train.epochs
                if checkpoint is not None and trains and (changed := changes(checkpoint.config, config)):
                    log.warning(
                        "from epoch %d on the run has %s: it can be compared with neither", checkpoint.epoch + 1, changed
                    )
                if checkpoint is not None and trains and (rise := _rise(checkpoint.config, config, checkpoint.epoch)):
                    log.warning(rise)
                result = _fit_with_trackers(trainer, progress)
            if after_save is not None:
                after_save()
            return result
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped in epoch {min(trainer.epoch + 1, config.train.epochs)}; resume with: {resume_command(folder)}",
                stop.status,
            ) from None


def _rise(before: RunConfig, config: RunConfig, epoch: int) -> str:
    """Say that the learning rate rises where a run is resumed to be longer: its schedule is that of the new length.

    Args:
        before: What the run was trained by.
        config: What it is resumed with.
        epoch: Epochs done.
    """
    if epoch == 0 or config.train.epochs <= before.train.epochs:
        return ""
    last = before.optimizer.lr * lr_factor(before.schedule, epoch - 1, before.train.epochs)
    first = config.optimizer.lr * lr_factor(config.schedule, epoch, config.train.epochs)
    if first <= last:
        return ""
    return (
        f"train.epochs is {config.train.epochs} (it was {before.train.epochs}): the learning rate rises from {last:.2g} in "
        f"epoch {epoch} to {first:.2g} in epoch {epoch + 1}, where the longer schedule has it"
    )


def _earlier_config(folder: Path, checkpoint: Checkpoint | None) -> RunConfig | None:
    """The configuration that an interrupted run trained by; None: it did not get as far as to write it."""
    if checkpoint is not None:
        return checkpoint.config
    try:
        return load_config(str(folder / CONFIG), []) if (folder / CONFIG).is_file() else None
    except UserError:  # damaged: nothing was trained yet that it could differ from
        return None


def _as_decided(config: RunConfig, asked: TrainConfig, earlier: TrainConfig) -> RunConfig:
    """`config` with what was left to 'auto' as the run decided it when it began.

    The configuration of a replaced worker or a repeated trial still says 'auto'.
    """
    left = [name for name in ("precision", "compile", "tau") if getattr(asked, name) == "auto"]
    # A run of an earlier version may not say it: then it is by rule, as it was there.
    decided = {name: value for name in left if (value := getattr(earlier, name)) != "auto"}
    return config.with_train(**decided)


def _same_data(world: World, prepared: Prepared) -> None:
    """Raise UserError where the prepared data of several nodes are of different images."""
    digests = world.all_gather(prepared.digests)
    others = [str(rank) for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if others:
        raise UserError(
            f"rank{'s' * (len(others) > 1)} {', '.join(others)}: the images in {str(prepared.folder)!r} are not rank 0's; "
            "give every node the same source, and remove that folder on each to prepare it again"
        )


def _fit_with_trackers(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """Train, write all files of the run folder, and send the numbers to trackers."""
    tags = {"code": trainer.code, "workers": str(trainer.world.size)}
    trainer.trackers = track_run(trainer.config, trainer.folder, tags)
    status: Status = "failed"
    try:
        result = _train_and_report(trainer, progress)
        status = "finished"
        return result
    except (KeyboardInterrupt, SystemExit):  # SystemExit: how Ray Tune stops a trial
        status = "stopped"
        raise
    finally:
        trainer.trackers.close(status)


def _train_and_report(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """Train, write all files of the run folder, and print the report."""
    folder = trainer.folder
    _begin_folder(trainer)
    folds = folds_of(trainer.config, trainer.prepared)
    trainer.keep_best = not folds
    _log_begin(trainer, folds)
    found = trainer.fit(progress)
    crossed = cross_validate(trainer, folds) if folds else None
    finished = Finished(trainer, found, folds, crossed, read_metrics(folder))
    result = result_content(finished)
    write_atomically(folder / RESULT, json.dumps(result, indent=1))
    (folder / RESULT_BEFORE).unlink(missing_ok=True)
    save_pictures(finished)
    trainer.trackers.end(outcome(finished))
    print_report(finished, result["time"], progress)
    return result


def _begin_folder(trainer: Trainer) -> None:
    """Write what is known before training, and set aside the result of a shorter run."""
    config, folder, prepared = trainer.config, trainer.folder, trainer.prepared
    trains = trainer.epoch < config.train.epochs or config.train.epochs == 0
    if trains or not (folder / CONFIG).is_file():  # else the file says what the run was trained by
        save_config(config, folder / CONFIG)
    keep_images(folder, prepared)
    if trainer.epoch < config.train.epochs and (folder / RESULT).is_file():
        # It is of a shorter run: its scores and tail shift are not those of the checkpoints to come.
        (folder / RESULT).replace(folder / RESULT_BEFORE)
    save_histogram(folder / HISTOGRAM, prepared.classes, prepared.train_counts)


def _log_begin(trainer: Trainer, folds: int) -> None:
    """Say what is trained, from which epoch, and what of it is probably a mistake."""
    config, folder = trainer.config, trainer.folder
    if trainer.epoch + trainer.step > 0 and trainer.epoch < config.train.epochs:
        steps = trainer.train_loaders[0].batches
        log.info("resuming in epoch %d, after step %d of %d", trainer.epoch + 1, trainer.step, steps)
    log.info(
        "%s: %s, %s head, %s, %s, %s, %s, %s; from epoch %d of %d",
        folder, config.network.backbone.title, config.network.head.kind, config.loss.kind, config.train.device,
        config.train.precision, trainer.train_loaders[0].name, _workers(trainer.world.size),
        trainer.epoch + 1, config.train.epochs,
    )  # fmt: skip
    for warning in [*config_warnings(config), *_few_validation_images(trainer.prepared, folds)]:
        log.warning(warning)
    if trainer.epoch >= config.train.epochs > 0:
        log.info("all %d epochs are done; to train longer: --resume %s --train.epochs N", trainer.epoch, folder)


def _few_validation_images(prepared: Prepared, folds: int) -> list[str]:
    """A warning where one image decides a class's validation accuracy, or half of it."""
    small = few_validation_images(prepared)
    if not small:
        return []
    said = (
        f"validation: {small} of {len(prepared.classes)} classes have one or two images, so which epoch is best is partly luck"
    )
    if folds:
        return [f"{said}: the last epoch is kept, and {folds} heads are cross-validated on the training images"]
    return [f"{said}; trust 'last' as much as 'best', or raise data.val_fraction"]


def _workers(count: int) -> str:
    return f"{count} workers" if count > 1 else "one process"
