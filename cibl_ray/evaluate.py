"""`python -m cibl_ray.evaluate RUN [--data FOLDER]`: repeat a run's evaluation from its checkpoint alone.

RUN is a run folder, or a checkpoint file. The network, the classes and their training counts come from the checkpoint. The
images are the run's own, prepared again if they are gone, or those of an image folder: FOLDER/CLASS/*, class names as trained.
--out writes CSV, a row for each image: checkpoint, image, label, class (the answer), probability, label_probability.
"""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cibl_ray.run.shift import shift_or_auto
from cibl_ray.run.which import checkpoints
from pipelines.common.errors import CommandParser, UserError, run_command
from pipelines.common.files import need_writable_file, write_output
from pipelines.common.words import plural

if TYPE_CHECKING:
    from cibl_ray.evaluation.evaluate import Evaluation

METRICS = ("overall", "balanced", "many", "medium", "few", "tail", "worst", "harmonic")


def main() -> None:
    """Evaluate a run as the command line says, and print the scores.

    Raises:
        UserError: An option does not fit, or the run or its images cannot be read.
    """
    parser = CommandParser(prog="python -m cibl_ray.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint file")
    parser.add_argument("--checkpoint", choices=["last", "best"], help="of a run folder; by default each that exists")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="evaluate on the images of FOLDER/CLASS/* instead")
    parser.add_argument("--split", choices=["train", "val", "test"], help="of the run's data; by default test, else val")
    parser.add_argument(
        "--tail-shift",
        type=shift_or_auto,
        default=0.0,
        metavar="auto|NUMBER",
        help="score logits - NUMBER * log prior; auto: what the run chose on held-out images, else, and with --metric, as is "
        "best on validation; default 0",
    )
    parser.add_argument("--metric", choices=METRICS, help="by which --tail-shift auto chooses; default balanced")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores, every class's too, to FILE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write each image's label and answer to FILE, as CSV")
    arguments = parser.parse_args()
    if arguments.data is not None and arguments.split is not None:
        raise UserError("--split is of the run's own data; it says nothing of --data")
    if arguments.data is not None:
        _refuse_unlabelled(arguments.data, arguments.run)
    if arguments.json is not None:
        need_writable_file(arguments.json, "--json", "scores.json")
    if arguments.out is not None:
        need_writable_file(arguments.out, "--out", "answers.csv")
        if arguments.json is not None and arguments.out.absolute() == arguments.json.absolute():
            raise UserError(f"--out and --json name one file, {str(arguments.out)!r}; name two")
    if arguments.metric is not None and arguments.tail_shift != "auto":
        raise UserError(f"--metric {arguments.metric} says how --tail-shift auto chooses; add that, or leave --metric out")
    from cibl_ray.evaluation.evaluate import evaluate
    from cibl_ray.evaluation.metrics import heading, table
    from cibl_ray.evaluation.tail_shift import recorded_choice
    from cibl_ray.run.checkpoint import load_checkpoint

    logging.basicConfig(format="%(message)s")

    scores = {}
    answers = io.StringIO(newline="")
    writer = csv.writer(answers, lineterminator="\n")
    writer.writerow(["checkpoint", "image", "label", "class", "probability", "label_probability"])
    for path in checkpoints(arguments.run, arguments.checkpoint):
        checkpoint = load_checkpoint(path)
        recorded = recorded_choice(path) if arguments.tail_shift == "auto" and arguments.metric is None else None
        shift = arguments.tail_shift if recorded is None else recorded.shift
        evaluation = evaluate(checkpoint, arguments.data, arguments.split, shift, arguments.metric or "balanced")
        if (chosen := recorded or evaluation.tail_shift) is not None:
            print(f"{path.stem}: {chosen.line()}")
        scores[f"{path.stem} (epoch {checkpoint.epoch})"] = evaluation.scores
        if arguments.out is not None:
            writer.writerows([path.stem, *row] for row in _answers(evaluation, checkpoint.classes))
    where = f"the {evaluation.split} split" if arguments.data is None else repr(str(arguments.data))
    print(heading(where) + "\n")
    print(table(scores))
    if arguments.json is not None:
        content = {"classes": checkpoint.classes} | {name: asdict(row) for name, row in scores.items()}
        write_output(arguments.json, json.dumps(content, indent=1).encode(), "--json")
    if arguments.out is not None:
        write_output(arguments.out, answers.getvalue().encode("utf-8", "surrogateescape"), "--out")


def _answers(evaluation: Evaluation, classes: list[str]) -> Iterator[list[str]]:
    """Of each image: its name, its label, the answer, and the probabilities of answer and label."""
    probabilities = evaluation.logits.softmax(1)
    best, answers = probabilities.max(1)
    of_label = probabilities.gather(1, evaluation.labels[:, None])[:, 0]
    columns = evaluation.labels.tolist(), answers.tolist(), best.tolist(), of_label.tolist()
    for image, label, answer, sure, true in zip(evaluation.images, *columns, strict=True):
        yield [image, classes[label], classes[answer], f"{sure:.4f}", f"{true:.4f}"]


def _refuse_unlabelled(folder: Path, run: Path) -> None:
    """Raise UserError for a folder that holds images and no classes."""
    from pipelines.image_files import LeftOut, class_folders, loose_images

    if folder.is_dir() and not class_folders(folder, LeftOut()) and (count := loose_images(folder)):
        raise UserError(
            f"--data {folder}: {plural(count, 'image', 'are')} directly in it, without classes; to evaluate, put them into "
            f"{folder / 'CLASS'}/*; to classify images without labels: python -m cibl_ray.predict {run} {folder}"
        )


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train]'")
