"""`python -m pipelines.prepare CONFIG`: write one .beton a split, and a sidecar that says what is in them."""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import argparse
import shlex
import sys

import numpy as np

from pipelines.common.command_line import ConfigParser
from pipelines.common.errors import Interrupted, UserError, run_command
from pipelines.common.words import plural
from pipelines.config import DataConfig
from pipelines.doctor.findings import gini, of_classes
from pipelines.prepare.build import COPIES, ensure_prepared, prepared_folder
from pipelines.prepare.check import check
from pipelines.prepare.command import PrepareConfig, from_command_line
from pipelines.prepare.pictures import histogram_text
from pipelines.prepare.prepared import Prepared
from pipelines.prepare.publish import publish
from pipelines.prepare.sources import class_counts
from pipelines.prepare.splits import choose, subset_seed


def _prepare() -> None:
    parser = ConfigParser(
        "pipelines.prepare.command:PrepareConfig",
        prog="python -m pipelines.prepare",
        usage="%(prog)s CONFIG [--count | --check | --cluster] [--field value ...]\n       %(prog)s [CONFIG] --help [PART]",
        description="Write the .beton files of CONFIG, a YAML file or the name of a shipped configuration.",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--count", action="store_true", help="only print the class counts; write nothing")
    only.add_argument(
        "--check", action="store_true", help="only list unreadable images, copies, and files in two places; write nothing"
    )
    on_ray = parser.add_argument_group("on a cluster")
    on_ray.add_argument("--cluster", action="store_true", help="read and encode the images in tasks of Ray")
    on_ray.add_argument("--workers", type=int, metavar="N", help="tasks at once; by default as many as there are CPUs")
    on_ray.add_argument("--address", help="of a Ray cluster, or 'auto'; by default one is started on this machine")
    asked = from_command_line(parser)
    if asked is None:
        return
    config, arguments = asked
    if arguments.cluster and (arguments.count or arguments.check):
        raise UserError("--count and --check write nothing, so there is nothing to do on a cluster; leave --cluster out")
    for option in ("workers", "address"):
        if getattr(arguments, option) is not None and not arguments.cluster:
            raise UserError(f"--{option} belongs to --cluster: add that")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: at least 1")
    if arguments.check:
        _check(config)
        return
    if arguments.count:
        classes, splits = choose(config.data.source.open(), config.data, subset_seed(config.data, config.seed))
        counts = {name: class_counts(images.labels, len(classes)) for name, images in splits.items()}
    else:
        own = config.data.model_copy(update={"published": None})  # prepared here, whatever is published
        prepared = _on_cluster(own, config.seed, arguments) if arguments.cluster else ensure_prepared(own, config.seed)
        classes = prepared.classes
        counts = {name: np.array(split.counts) for name, split in prepared.splits.items()}
    print(histogram_text(classes, counts["train"]))
    for name, of_class in counts.items():
        images = plural(int(of_class.sum()), "image")
        print(f"{name}: {images}, {len(classes)} classes, {of_class.min()} to {of_class.max()} a class")
    if not arguments.count:
        print(f"prepared: {prepared.folder}, picture: {prepared.folder / 'class_counts.png'}")
        if config.data.published is not None:
            if prepared.folder != prepared_folder(own, config.seed):
                raise UserError(
                    f"{str(prepared.folder)!r} is an earlier version's; bring the source back, and prepare it again"
                )
            publish(prepared, config.data.published)
            print(f"published: {config.data.published}/{prepared.folder.name}")
        _doctor(prepared, counts)


def _on_cluster(data: DataConfig, seed: int, arguments: argparse.Namespace) -> Prepared:
    from pipelines.prepare.on_ray import RayPacker, cluster

    with cluster(arguments.address):
        return ensure_prepared(data, seed, packer=RayPacker(arguments.workers))


def _doctor(prepared: Prepared, counts: dict[str, np.ndarray]) -> None:
    """What the doctor says of the counts and of exact copies, and how to get its page, which looks at every picture."""
    train = counts["train"]
    print(f"doctor: {train.max() / train.min():,.4g} to 1, Gini {gini(train):.2f}")
    for finding in of_classes(prepared.classes, counts):
        print(f"doctor: {finding.title}")
    copies = prepared.folder / COPIES
    if copies.is_file():
        print(f"doctor: images with the same bytes are listed in {copies}")
    page = f"python -m pipelines.doctor {shlex.join(sys.argv[1:])}"
    print(f"doctor: a page of near copies, wrong labels and odd images: {page}")


def main() -> None:
    """Prepare, or say how to continue where Ctrl-C stops it."""
    try:
        _prepare()
    except Interrupted:  # which says what is kept
        raise
    except KeyboardInterrupt as error:
        raise Interrupted("stopped; finished files are kept: run the same command again to continue") from error


def _check(config: PrepareConfig) -> None:
    """List what is wrong with the images. Raises UserError where anything is."""
    data = config.data.model_copy(update={"on_bad_image": "skip"})  # missing files are listed, too
    seed = subset_seed(data, config.seed)
    findings = check(choose(data.source.open(), data, seed)[1], data, seed)
    for line in findings.lines():
        print(line)
    if findings.bad or findings.shared:
        raise UserError(findings.summary())
    print(findings.summary())


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train]'")
