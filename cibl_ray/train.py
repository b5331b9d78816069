"""`python -m cibl_ray.train CONFIG [--field value ...]`: train, evaluate, and leave a run folder.

CONFIG is a YAML file or the name of a shipped configuration. Any field may be overridden, by its dotted name or by the last
part of it where that is unique: `--train.epochs 20`, `--lr .2`, `--loss.kind cross_entropy`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from cibl_ray.cluster.environment import settle
from pipelines.common.errors import CommandParser, Interrupted, UserError, run_command
from pipelines.common.settings import split_command_line

if TYPE_CHECKING:
    from cibl_ray.cluster.storage import Mirror
    from cibl_ray.run.progress import Progress
    from cibl_ray.training.trainer import Trainer
    from cibl_ray.world import World
    from pipelines.prepare.prepared import Prepared

CONFIG = "config.yaml"
RESULT = "result.json"
log = logging.getLogger("cibl_ray")


def main() -> None:
    parser = CommandParser(
        prog="python -m cibl_ray.train",
        usage="%(prog)s CONFIG [--name NAME] [--cluster] [--field value ...]\n"
        "       %(prog)s [CONFIG] --resume RUN [--cluster] [--field value ...]",
        description=__doc__,
    )
    parser.add_argument("--name", help="of the run folder; by default the configuration's name and the time")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, or at this URI (with --cluster)")
    cluster = parser.add_argument_group("on a cluster")
    cluster.add_argument("--cluster", action="store_true", help="train in Ray Train's workers")
    cluster.add_argument("--workers", metavar="N", help="how many, or the least and the most: 2-8")
    cluster.add_argument("--address", help="of a Ray cluster, or 'auto'; by default one is started on this machine")
    cluster.add_argument("--storage", metavar="URI", help="s3://, gs://, ...: keep a copy of the run folder under it")
    cluster.add_argument("--cpus-per-worker", type=int, metavar="N", help="by default what fits")
    cluster.add_argument("--max-failures", type=int, metavar="N", help="lost workers to replace (default: 3)")
    name, arguments, overrides = split_command_line(parser)
    if name is None and arguments.resume is None:
        raise UserError("name a configuration first (quickstart, say) to start a run, or --resume RUN to go on with one")
    for option in ("workers", "address", "storage", "cpus_per_worker", "max_failures"):
        if getattr(arguments, option) is not None and not arguments.cluster:
            hint = "; the loader's threads are --loader.workers" if option == "workers" else ""
            raise UserError(f"--{option.replace('_', '-')} belongs to --cluster: add that{hint}")
    if arguments.resume is not None and arguments.name is not None:
        same_name(arguments.name, arguments.resume)
    storage = arguments.storage
    if arguments.resume is not None and "://" in arguments.resume:
        if not arguments.cluster:
            raise UserError(f"--resume {arguments.resume}: a run in an object store goes on with --cluster: add that")
        from cibl_ray.cluster.storage import fetched

        storage, folder = fetched(arguments.resume)
        config, folder = _resumed(folder, overrides, name)
    elif arguments.resume is not None:
        folder = Path(arguments.resume)
        if arguments.cluster:
            from cibl_ray.cluster.storage import in_step

            storage = in_step(folder.absolute(), storage)
        config, folder = _resumed(folder, overrides, name)
    else:
        from cibl_ray.config import load_config

        assert name is not None
        config = load_config(name, overrides)
        folder = config.runs / (arguments.name or f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    if arguments.cluster:
        settle(own=arguments.address is None)
        from cibl_ray.cluster.launch import FAILURES, Options, fit, parse_workers

        failures = FAILURES if arguments.max_failures is None else arguments.max_failures
        options = Options(
            parse_workers(arguments.workers or "1"), arguments.address, arguments.cpus_per_worker, failures, storage
        )
        fit(config, folder, arguments.resume is not None, options)
        return
    from cibl_ray.run.progress import Silent, Terminal
    from cibl_ray.world import join, leave

    world = join()
    folder = world.from_first(lambda: folder)  # every rank has a clock of its own
    try:
        train(config, folder, arguments.resume is not None, world, Terminal() if world.first else Silent())
    finally:
        leave()


def train(
    config: Any,
    folder: Path,
    resume: bool,
    world: World,
    progress: Progress,
    mirror: Mirror | None = None,
    patience: float = 0,
) -> dict[str, Any]:
    """Run a configuration in `folder`, new or (with `resume`) an earlier run's; returns the result that result.json holds.

    Every worker of `world` calls it; rank 0 alone writes, and has a result. mirror: where rank 0 keeps a copy of the folder.
    patience: seconds to wait for another process that works in the folder: a lost worker's may end after it is replaced.
    """
    from cibl_ray.cluster.storage import copy_of
    from cibl_ray.hardware import TIMER_LAG, keep_freed_memory, let_timers_lag
    from cibl_ray.run.checkpoint import newest
    from cibl_ray.training.trainer import Trainer, resolve
    from cibl_ray.world import need_own_device
    from pipelines.prepare.build import ensure_prepared

    keep_freed_memory()
    let_timers_lag(TIMER_LAG)  # a cluster of this machine's own has left more
    config = world.from_first(lambda: resolve(config))
    need_own_device(config.train.device)
    if not resume:
        world.from_first(lambda: need_new(folder))
    prepared = ensure_prepared(config.data, config.seed)
    _same_data(world, prepared)
    if world.first:
        _log_to(None, progress)
        copy = copy_of(folder)
        if copy is not None and mirror is None:
            log.warning("its copy %s is not brought up to date; --resume %s --cluster does that", copy, folder)
    checkpoint = world.from_first(lambda: newest(folder / "checkpoints")) if resume else None
    if checkpoint is not None and config.loader.cache == "auto":
        # Decided when the run began: another order would not be the epoch that the checkpoint stands in.
        loader = config.loader.model_copy(update={"cache": checkpoint.config.loader.cache})
        config = config.model_copy(update={"loader": loader})
    trainer = Trainer(config, prepared, folder, world)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if not world.first:
        return trainer.fit(progress)
    # From here on nothing is refused any more, so that a mistake leaves no folder and changes no earlier run.
    try:
        folder.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as error:
        raise UserError(f"run folder {str(folder)!r} has just been made by another process; choose another --name") from error
    with lock_folder(folder, "training", max(patience, 30 if world.size > 1 else 0)), _stops_in_order(trainer):
        try:
            if mirror is not None:
                trainer.after_save = mirror.upload
            result = _fit(trainer, progress)
            if mirror is not None:
                mirror.upload()
            return result
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped in epoch {min(trainer.epoch + 1, config.train.epochs)}; go on with: "
                f"python -m cibl_ray.train --resume {shlex.quote(str(folder))}"
            ) from None


def _same_data(world: World, prepared: Prepared) -> None:
    """Raises UserError where workers of several nodes, each with prepared data of its own, would train on other images."""
    digests = world.everyones(prepared.digests)
    others = [str(rank) for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if others:
        raise UserError(
            f"rank{'s' * (len(others) > 1)} {', '.join(others)}: the images in {str(prepared.folder)!r} are not rank 0's; "
            "give every node the same source, and remove that folder on each to prepare it again"
        )


def _fit(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """Train, and leave everything that a run folder holds."""
    from cibl_ray.config import doubts, save_config
    from cibl_ray.evaluation.metrics import heading, table
    from cibl_ray.evaluation.pictures import save_accuracy_by_class, save_learning_curves
    from cibl_ray.hardware import describe
    from cibl_ray.run.log import read_metrics
    from pipelines.prepare.pictures import save_histogram

    config, folder, prepared = trainer.config, trainer.folder, trainer.prepared
    _log_to(folder / "train.log", progress)
    save_config(config, folder / CONFIG)
    save_histogram(folder / "class_counts.png", prepared.classes, prepared.train_counts)
    log.info(
        "%s: %s, %s head, %s, %s, %s, %s, %s; from epoch %d of %d",
        folder, config.network.backbone, config.network.head.kind, config.loss.kind, config.train.device,
        config.train.precision, trainer.train_loaders[0].name, _workers(trainer.world.size),
        trainer.epoch + 1, config.train.epochs,
    )  # fmt: skip
    for doubt in doubts(config):
        log.warning(doubt)
    if trainer.epoch >= config.train.epochs:
        log.info("all %d epochs are done; to train on: --resume %s --train.epochs N", trainer.epoch, folder)
    result = trainer.fit(progress)
    rows = read_metrics(folder)
    kinds = [name for name in ("last", "best") if name in result]
    scores = {f"{name} (epoch {result[name]['epoch']})": result[name]["scores"] for name in kinds}
    result |= {name: {**result[name], "scores": asdict(result[name]["scores"])} for name in kinds}
    result |= {
        "seconds": sum(row["seconds"]["epoch"] for row in rows),
        "time": {name: seconds + trainer.spent.get(name, 0.0) for name, seconds in _time(rows).items()},
        "classes": prepared.classes,  # of the scores' `per_class`, in order
        "images_per_s": statistics.median([row["rate"]["images_per_s"] for row in rows] or [0.0]),  # a log that was removed
        "workers": trainer.world.size,
        "loader": trainer.train_loaders[0].name,
        "data": prepared.digests,
        "code": sorted({row.get("code", "unknown") for row in rows}),
        "hardware": describe(config.train.device),
    }
    part = folder / f"{RESULT}.part"
    part.write_text(json.dumps(result, indent=1))
    part.replace(folder / RESULT)
    if rows:
        save_learning_curves(folder / "learning_curves.png", rows)
    save_accuracy_by_class(folder / "accuracy_by_class.png", prepared.classes, prepared.train_counts, scores)
    where = f"the {result['split']} split"
    progress.line(f"\n{heading(where)}\n")
    progress.line(table(scores))
    if "best" not in result:
        progress.line("\nNo validation split, so no best epoch: data.val_fraction carves one out.")
    progress.line(f"\nTime: {_shares(result['time'])}")
    progress.line(f"Run folder: {folder}\nPictures:   learning_curves.png, accuracy_by_class.png, class_counts.png")
    return result


def _workers(count: int) -> str:
    return f"{count} workers" if count > 1 else "one process"


def _time(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Where rank 0's seconds went, over all epochs, without what came after the last one's row."""
    time = {
        name: sum(row["seconds"][name] for row in rows) for name in ("data_wait", "communication", "evaluation", "checkpoint")
    }
    return {"step": sum(row["seconds"]["epoch"] for row in rows) - time["data_wait"] - time["communication"]} | time


def _shares(seconds: dict[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{name.replace('_', ' ')} {100 * value / total:.0f} %" for name, value in seconds.items())


def need_new(folder: Path) -> None:
    """Raise UserError where a run folder is there already."""
    if not folder.exists():
        return
    way = ""
    if (folder / CONFIG).exists():
        way = f"go on with --resume {folder}, or "
    elif _never_begun(folder):
        way = "no run began in it: remove it, or "
    raise UserError(f"run folder {str(folder)!r} already exists; {way}choose another --name")


def same_name(name: str, resumed: str) -> None:
    """Raise UserError where --name is not of the folder or URI that --resume names, which would be changed in its place."""
    names = [part for part in name.split("/") if part]
    if names and Path(resumed).absolute().parts[-len(names) :] != tuple(names):
        raise UserError(f"--name {name}: --resume goes on in {resumed} itself; leave --name out")


def _never_begun(folder: Path) -> bool:
    """Whether a folder is as a kill leaves it before the configuration is written."""
    first = {".lock", ".storage", "train.log", f"{CONFIG}.part"}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= first


def _resumed(folder: Path, overrides: list[str], name: str | None) -> tuple[Any, Path]:
    """The run's configuration with `overrides`; where `name` is given too, as in the command that began it, it must agree."""
    from cibl_ray.config import build_config, load_config
    from pipelines.common.settings import read_config

    if not (folder / CONFIG).is_file():
        left = "; no run began in it: remove it, and start the run anew" if _never_begun(folder) else ""
        raise UserError(f"--resume {folder}: not a run folder, it has no {CONFIG}{left}")
    content = read_config(folder / CONFIG) or _of_checkpoint(folder)
    if name is not None:
        begun = build_config(content, [], str(folder / CONFIG))
        # How it is executed is decided as a run begins, and stands in the run's own file.
        execution: Any = {"runs": True, "loader": True, "train": {"device", "precision"}, "data": {"prepared"}}
        wanted, there = (one.model_dump(mode="json", exclude=execution) for one in (load_config(name, overrides), begun))
        changed = sorted(part for part in wanted if wanted[part] != there[part])
        if changed:
            raise UserError(
                f"--resume {folder}: that run is of another configuration than {name} ({', '.join(changed)} differ); "
                f"leave {name} out to go on with the run's own, or start a new one without --resume"
            )
    return build_config(content, overrides, str(folder / CONFIG)), folder.absolute()


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    """The configuration of a run whose file is empty, as a power cut may leave it."""
    from cibl_ray.run.checkpoint import newest

    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"--resume {folder}: its {CONFIG} is empty and it has no checkpoint; remove it, and start the run anew")
    log.warning("%s is empty; going on with the configuration of the last checkpoint", folder / CONFIG)
    return checkpoint.config.model_dump(mode="json")


def lock_folder(folder: Path, doing: str, patience: float) -> IO[str]:
    """Held while a process works in a run folder, so that no two do. Ends with the process, for which it waits some seconds."""
    lock = (folder / ".lock").open("w")
    begun = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError as error:
            if time.monotonic() - begun >= patience:
                raise UserError(f"another process is {doing} in {str(folder)!r}; wait for it, or end it") from error
            time.sleep(0.2)


@contextmanager
def _stops_in_order(trainer: Trainer) -> Iterator[None]:
    """A cluster's polite end is treated as Ctrl-C. Signals belong to the main thread; elsewhere nothing is changed.

    The trainer is told as well: an exception that happens to be raised within a destructor or a callback is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.asked_to_stop = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _log_to(path: Path | None, progress: Progress) -> None:
    """Messages go where progress is shown, and to the file where there is one."""
    for name in ("cibl_ray", "pipelines"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        for handler in [*logger.handlers]:
            logger.removeHandler(handler)
            handler.close()
        handlers = [progress.log_handler()]
        if path is not None:
            handlers.append(logging.FileHandler(path))
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)


if __name__ == "__main__":
    run_command(main)
