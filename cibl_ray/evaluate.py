"""`python -m cibl_ray.evaluate RUN [--data FOLDER]`: repeat a run's evaluation from its checkpoint alone.

RUN is a run folder, or a checkpoint file. The network, the classes and their training counts come from the checkpoint. The
images are the run's own, prepared again if they are gone, or those of an image folder: FOLDER/CLASS/*, class names as trained.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cibl_ray.run.folder import checkpoints
from pipelines.common.errors import CommandParser, UserError, run_command

if TYPE_CHECKING:
    from cibl_ray.evaluation.metrics import Scores
    from cibl_ray.run.checkpoint import Checkpoint

log = logging.getLogger(__name__)


def main() -> None:
    parser = CommandParser(prog="python -m cibl_ray.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint file")
    parser.add_argument("--checkpoint", choices=["last", "best"], help="of a run folder; by default each that exists")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="evaluate on the images of FOLDER/CLASS/* instead")
    parser.add_argument("--split", choices=["train", "val", "test"], help="of the run's data; by default test, else val")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores, every class's too, to FILE")
    arguments = parser.parse_args()
    if arguments.data is not None and arguments.split is not None:
        raise UserError("--split is of the run's own data; it says nothing of --data")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: the folder {str(arguments.json.parent)!r} does not exist")
    from cibl_ray.evaluation.metrics import heading, table
    from cibl_ray.run.checkpoint import load_checkpoint

    logging.basicConfig(format="%(message)s")

    scores = {}
    for path in checkpoints(arguments.run, arguments.checkpoint):
        checkpoint = load_checkpoint(path)
        split, scores[f"{path.stem} (epoch {checkpoint.epoch})"] = _evaluate(checkpoint, arguments.data, arguments.split)
    where = f"the {split} split" if arguments.data is None else repr(str(arguments.data))
    print(heading(where) + "\n")
    print(table(scores))
    if arguments.json is not None:
        content = {"classes": checkpoint.classes} | {name: asdict(row) for name, row in scores.items()}
        arguments.json.write_text(json.dumps(content, indent=1))


def evaluate(checkpoint: Checkpoint, folder: Path | None = None, split: str | None = None) -> Scores:
    """Scores of a checkpoint on its run's data, or on an image folder with the same class names. Raises UserError."""
    return _evaluate(checkpoint, folder, split)[1]


def _evaluate(checkpoint: Checkpoint, folder: Path | None, split: str | None) -> tuple[str, Scores]:
    """The split that it was, by default test, else val, and the scores."""
    import torch

    from cibl_ray.evaluation.metrics import score
    from cibl_ray.evaluation.predict import predict
    from cibl_ray.training.trainer import resolve
    from pipelines.augment.recipe import Normalize
    from pipelines.loaders.make import make_loader
    from pipelines.loaders.reading import eval_reading
    from pipelines.prepare.build import ensure_prepared, prepare_folder

    network = checkpoint.network()
    train = checkpoint.config.train.model_copy(update={"device": "auto"})  # not the machine that trained
    config = resolve(checkpoint.config.model_copy(update={"train": train}))
    device = torch.device(config.train.device)
    if folder is None:
        prepared = ensure_prepared(config.data, config.seed)
        split = split or ("test" if "test" in prepared.splits else "val")
        if split not in prepared.splits:
            raise UserError(f"the run's data have no {split!r} split; there are: {', '.join(prepared.splits)}")
        if prepared.classes != checkpoint.classes:
            raise UserError("the data's classes are no longer those the checkpoint was trained on")
        if not prepared.splits[split].has(checkpoint.data.get(split)):
            log.warning("the %s images have changed since this checkpoint was trained", split)
    else:
        prepared, split = prepare_folder(folder.absolute(), checkpoint.classes, config.data), "test"
    loader = make_loader(prepared, split, eval_reading(config.data, config.train.eval_batch_size), config.loader)
    try:
        logits, labels = predict(network.to(device), loader, Normalize(config.data).to(device), device)
    finally:
        loader.close()
    return split, score(logits, labels, checkpoint.train_counts)


if __name__ == "__main__":
    run_command(main)
