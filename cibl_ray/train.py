"""`python -m cibl_ray.train CONFIG [--field value ...]`: train, evaluate, and leave a run folder.

CONFIG is a YAML file or the name of a shipped configuration; without one, `quickstart` trains. Any field may be overridden, by
its dotted name or by the last part of it where that is unique: `--train.epochs 20`, `--lr .2`, `--loss.kind cross_entropy`.
"""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import sys
import time
from pathlib import Path

from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.run.folder import CONFIG, same_name
from pipelines.common.command_line import ConfigParser, print_config
from pipelines.common.errors import UserError, run_command

DEFAULT = "quickstart"


def main() -> None:
    """The command."""
    parser = ConfigParser(
        "cibl_ray.config:RunConfig",
        prog="python -m cibl_ray.train",
        usage="%(prog)s [CONFIG] [--name NAME] [--cluster] [--field value ...]\n"
        "       %(prog)s [CONFIG] --resume RUN [--cluster] [--field value ...]\n"
        "       %(prog)s [CONFIG] --help [PART]",
        description=__doc__,
    )
    parser.add_argument("--name", help="of the run folder; by default the configuration's name and the time")
    parser.add_argument("--resume", metavar="RUN", help="resume the run in this folder, or at this URI (with --cluster)")
    cluster = parser.add_argument_group("on a cluster")
    cluster.add_argument("--cluster", action="store_true", help="train in Ray Train's workers")
    cluster.add_argument("--workers", metavar="N", help="how many, or the least and the most: 2-8")
    cluster.add_argument("--address", help="of a Ray cluster, or 'auto'; by default one is started on this machine")
    cluster.add_argument("--storage", metavar="URI", help="s3://, gs://, ...: keep a copy of the run folder under it")
    cluster.add_argument("--cpus-per-worker", type=int, metavar="N", help="by default what fits")
    cluster.add_argument("--max-failures", type=int, metavar="N", help="lost workers to replace (default: 3)")
    name, arguments, overrides = parser.split()
    if parser.helped(name, DEFAULT, arguments, overrides):
        return
    for option in ("name", "resume", "address", "storage"):
        if (value := getattr(arguments, option)) is not None and not value.strip():
            raise UserError(f"--{option} {value!r} is empty; is a shell variable unset?")
    for option in ("workers", "address", "storage", "cpus_per_worker", "max_failures"):
        if getattr(arguments, option) is not None and not arguments.cluster:
            hint = "; the loader's threads are --loader.workers" if option == "workers" else ""
            raise UserError(f"--{option.replace('_', '-')} belongs to --cluster: add that{hint}")
    if arguments.cpus_per_worker is not None and arguments.cpus_per_worker < 1:
        raise UserError(f"--cpus-per-worker {arguments.cpus_per_worker}: give at least 1, or leave it out for what fits")
    if arguments.max_failures is not None and arguments.max_failures < 0:
        raise UserError(f"--max-failures {arguments.max_failures}: give at least 0, which replaces no lost worker")
    if arguments.resume is not None and arguments.name is not None:
        same_name(arguments.name, arguments.resume)
    storage = arguments.storage
    if storage is not None:
        from cibl_ray.cluster.storage import tidy

        storage = tidy(storage)
    if arguments.resume is not None and "://" in arguments.resume:
        if not arguments.cluster:
            raise UserError(f"--resume {arguments.resume}: a run in an object store needs --cluster: add that")
        if storage is not None:
            raise UserError(f"--storage {storage}: --resume names the copy itself, which goes on; leave --storage out")
        if arguments.print_config:
            raise UserError(
                f"--print-config would fetch the run: its configuration is {arguments.resume.rstrip('/')}/config.yaml"
            )
        from cibl_ray.cluster.storage import fetched
        from cibl_ray.training.resume import resumed

        storage, folder = fetched(arguments.resume)
        config, folder = resumed(folder, overrides, name)
    elif arguments.resume is not None:
        from cibl_ray.training.resume import resumed

        folder = Path(arguments.resume)
        if arguments.cluster and not arguments.print_config:
            from cibl_ray.cluster.storage import sync_with_copy

            storage = sync_with_copy(folder.absolute(), storage)
        config, folder = resumed(folder, overrides, name)
    else:
        from cibl_ray.config import load_config

        config = load_config(name or DEFAULT, overrides)
        if name is None:
            print(
                f"no configuration named: training {DEFAULT}, long-tailed handwritten digits. "
                "Your own images: python -m cibl_ray.train folder --data.source.path FOLDER",
                file=sys.stderr,
            )
            name = DEFAULT
        # The configuration of a run is called after the run: its file has the same name in each.
        stem = Path(name).absolute().parent.name if Path(name).name == CONFIG else Path(name).stem
        folder = config.runs / (arguments.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    if arguments.print_config:
        print_config(config)
        return
    if arguments.cluster:
        configure_ray_env(own=arguments.address is None)
        from cibl_ray.cluster.launch import FAILURES, Options, fit_on_cluster, parse_workers

        failures = FAILURES if arguments.max_failures is None else arguments.max_failures
        options = Options(
            parse_workers(arguments.workers or "1"), arguments.address, arguments.cpus_per_worker, failures, storage
        )
        fit_on_cluster(config, folder, arguments.resume is not None, options)
        return
    from cibl_ray.run.stop import stop_signals

    with stop_signals(exits=True) as stop:
        from cibl_ray.hardware import keep_freed_memory
        from cibl_ray.run.progress import Silent, Terminal
        from cibl_ray.training.fit import fit
        from cibl_ray.world import join, leave

        keep_freed_memory()
        world = join()
        folder = world.broadcast_from_rank0(lambda: folder)  # every rank has a clock of its own
        progress = Terminal() if world.is_rank0 else Silent()
        try:
            fit(config, folder, arguments.resume is not None, world, progress, stop=stop)
        finally:
            leave()


if __name__ == "__main__":
    run_command(main, f"'cibl-ray[train{',cluster' if '--cluster' in sys.argv else ''}]'")
