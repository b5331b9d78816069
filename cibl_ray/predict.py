"""`python -m cibl_ray.predict RUN IMAGES... [--out answers.csv]`: classify image files and folders, without a service.

RUN is a run folder, a checkpoint file, or a bundle. IMAGES are files, and folders whose images are all classified. The answers
are CSV: image, class, probability; with --top N the N most probable classes. If a run's validation images chose a tail shift,
it is applied, as in the run's bundle.
"""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cibl_ray.run.folder import is_run
from cibl_ray.run.shift import asked_shift, shift_or_auto
from cibl_ray.run.which import checkpoint
from pipelines.common.errors import CommandParser, Interrupted, UserError, run_command
from pipelines.common.files import need_writable_file, write_output
from pipelines.pixels import MAX_PIXELS


def main() -> None:
    """Classify the images that the command line names, and write the answers as CSV.

    Raises:
        UserError: An option does not fit, the run cannot be read, or a file could not be classified.
    """
    parser = CommandParser(prog="python -m cibl_ray.predict", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, a checkpoint file, or a bundle")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the answers to FILE; by default they are printed")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="classes of an answer; default 1")
    parser.add_argument("--checkpoint", choices=["best", "last"], help="of a run folder; by default best, else last")
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help=f"of an image, at most; by default as in training, else {MAX_PIXELS:,}",
    )
    parser.add_argument(
        "--tail-shift", type=shift_or_auto, metavar="auto|NUMBER", help="of a run; by default auto: what validation chose"
    )
    arguments = parser.parse_args()
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: at least 1")
    if arguments.max_pixels is not None and arguments.max_pixels < 1:
        raise UserError(f"--max-pixels {arguments.max_pixels}: at least 1")
    if arguments.out is not None:
        need_writable_file(arguments.out, "--out", "answers.csv")
    from cibl_ray.bundle.card import MANIFEST
    from cibl_ray.evaluation.classify import Unreadable, classify, from_bundle, from_checkpoint, image_files
    from pipelines.library_warnings import collected_warnings

    files = image_files(arguments.images)
    if (arguments.run / MANIFEST).is_file() and not is_run(arguments.run):  # a run's copy in a store has one, too
        if arguments.tail_shift is not None or arguments.checkpoint is not None:
            raise UserError("--tail-shift and --checkpoint are of a run; a bundle has its own")
        classifier = from_bundle(arguments.run)
    else:
        path = checkpoint(arguments.run, arguments.checkpoint)
        shift = asked_shift(path, arguments.tail_shift)
        from cibl_ray.run.checkpoint import load_checkpoint

        classifier = from_checkpoint(load_checkpoint(path), shift)
    if arguments.max_pixels is not None:
        classifier = replace(classifier, max_pixels=arguments.max_pixels)
    bad = 0
    kept = io.StringIO(newline="")
    writer = csv.writer(sys.stdout if arguments.out is None else kept, lineterminator="\n")
    top = min(arguments.top, len(classifier.classes))
    numbers = ["", *(f"_{number}" for number in range(2, top + 1))]
    writer.writerow(["image", *(f"{name}{number}" for number in numbers for name in ("class", "probability"))])
    with collected_warnings() as warned, _kept_on_stop(arguments.out, kept):
        for answer in classify(classifier, files, warned.begin):
            if isinstance(answer, Unreadable):
                bad += 1
                fix = "; --max-pixels allows it" if answer.too_large else ""
                print(f"{answer.image}: {answer.problem}{fix}", file=sys.stderr)
                continue
            best = sorted(answer.probabilities.items(), key=lambda item: -item[1])[:top]
            writer.writerow([answer.image, *(part for name, value in best for part in (name, f"{value:.4f}"))])
    if text := warned.text():
        print(text, file=sys.stderr)
    if arguments.out is not None:
        _save(arguments.out, kept.getvalue())
    if bad:
        raise UserError(f"{bad} of {len(files)} files could not be classified; the lines above say why")


@contextmanager
def _kept_on_stop(out: Path | None, kept: io.StringIO) -> Iterator[None]:
    """After Ctrl-C, write the answers so far."""
    try:
        yield
    except KeyboardInterrupt as error:
        if out is None:
            raise
        _save(out, kept.getvalue())
        raise Interrupted(f"stopped; {out} has the answers so far") from error


def _save(path: Path, text: str) -> None:
    write_output(path, text.encode("utf-8", "surrogateescape"), "--out")  # a name of a file may be in another encoding


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train]'")
