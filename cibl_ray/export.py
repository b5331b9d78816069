"""`python -m cibl_ray.export RUN [--precision fp32 fp16 int8]`: a run's checkpoint as a bundle that can be served, and run
alone.

RUN is a run folder, or a checkpoint file. The bundle is a folder of ONNX files with a manifest and a model card. It appears
only when everything in it has been verified: ONNX against torch, the server's pixels against those of the evaluation, every
precision's accuracy on the test images with onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cibl_ray.run.folder import CHECKPOINTS, checkpoint
from pipelines.common.errors import CommandParser, UserError, run_command

if TYPE_CHECKING:
    import numpy as np

    from cibl_ray.bundle.runtime import Provider, Runtime
    from cibl_ray.bundle.targets import Target
    from cibl_ray.config import RunConfig
    from cibl_ray.evaluation.metrics import Scores
    from cibl_ray.networks.network import HybridNetwork
    from cibl_ray.run.checkpoint import Checkpoint
    from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)

VERIFIED_BATCHES = (1, 2, 17)
TOLERANCE = 1e-4  # of fp32 logits, onnxruntime against torch
SHIFTS = tuple(step / 4 for step in range(9))  # of the table and picture of tail_shift


@dataclass(frozen=True)
class Options:
    """precisions: fp32 is always among them. max_drop: points of accuracy that a shot group may lose to fp16 or int8.
    calibration: images for int8, as many of each class."""

    precisions: tuple[str, ...] = ("fp32",)
    name: str | None = None
    embedding: bool = False
    target: Target | None = None
    max_drop: float = 1.0
    calibration: int = 512
    provider: Provider = "auto"


def main() -> None:
    parser = CommandParser(prog="python -m cibl_ray.export", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint file")
    parser.add_argument("--checkpoint", choices=["best", "last"], help="of a run folder; by default best, else last")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "fp16", "int8"], default=["fp32"], help="fp32 is always made"
    )
    parser.add_argument("--out", type=Path, help="the bundle's folder; by default `bundle` in the run folder")
    parser.add_argument("--name", help="the model's name for its clients; by default the run's")
    parser.add_argument("--embedding", action="store_true", help="a third output, the image's unit embedding")
    parser.add_argument("--target", choices=["x86", "x86-avx2", "arm"], help="CPU that int8 is for; by default this one")
    parser.add_argument("--max-drop", type=_points, default=1.0, help="points a shot group may lose to fp16 or int8; default 1")
    parser.add_argument("--calibration", type=_count, default=512, help="images that calibrate int8; default 512")
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda", "tensorrt"], default="auto", help="of onnxruntime")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    path = checkpoint(arguments.run, arguments.checkpoint)
    out = arguments.out or (arguments.run if arguments.run.is_dir() else arguments.run.with_suffix("")) / "bundle"
    options = Options(
        precisions=tuple(dict.fromkeys(["fp32", *arguments.precision])),
        name=arguments.name,
        embedding=arguments.embedding,
        target=arguments.target,
        max_drop=arguments.max_drop,
        calibration=arguments.calibration,
        provider=arguments.provider,
    )
    export(path, out.absolute(), options)
    print(f"bundle: {out}; serve it: python -m serve {out}")


def export(checkpoint_file: Path, out: Path, options: Options) -> None:
    """Write the bundle of a checkpoint to the folder `out`, which must not exist. Raises UserError, leaving nothing."""
    if out.exists():
        raise UserError(f"{str(out)!r} exists; remove it, or name another folder: --out")
    from cibl_ray.run.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(checkpoint_file)
    source = _source(checkpoint_file, checkpoint)
    name = _model_name(options.name or source["run"])
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _Export(checkpoint, replace(options, name=name), source, part).make()
        part.chmod(0o755)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Export:
    """One export, into the folder `part`."""

    def __init__(self, checkpoint: Checkpoint, options: Options, source: dict[str, Any], part: Path) -> None:
        from cibl_ray.training.trainer import resolve
        from pipelines.loaders.reading import eval_rule
        from pipelines.prepare.build import ensure_prepared

        self.checkpoint, self.options, self.source, self.part = checkpoint, options, source, part
        train = checkpoint.config.train.model_copy(update={"device": "cpu", "precision": "fp32"})
        self.config: RunConfig = resolve(checkpoint.config.model_copy(update={"train": train}))
        self.rule = eval_rule(self.config.data)
        self.prepared: Prepared = ensure_prepared(self.config.data, self.config.seed)
        if self.prepared.classes != checkpoint.classes:
            raise UserError("the data's classes are no longer those the checkpoint was trained on")
        self.split = "test" if "test" in self.prepared.splits else "val"
        self.network: HybridNetwork = checkpoint.network().eval()

    def make(self) -> None:
        from cibl_ray.bundle.card import FILES, MANIFEST
        from cibl_ray.exporting.onnx_graph import export_base
        from cibl_ray.exporting.report import save_tail_shift, write_model_card
        from pipelines.prepare.pictures import save_histogram

        checkpoint, options, part = self.checkpoint, self.options, self.part
        images = self._first_images(sum(VERIFIED_BATCHES))
        self._verify_pixels(images)
        log.info("exporting the graph")
        with tempfile.TemporaryDirectory(dir=part) as scratch:
            bases = {"fp32": Path(scratch) / "fp32.onnx"}
            export_base(self.network, self.config.data, options.embedding, bases["fp32"])
            self._convert(bases)
            self._finish(bases, accuracy={})
            runtimes = self._open()
            self._verify_logits(runtimes["fp32"], images)
            scores, shifted = self._measure(runtimes)
            self._compare(scores)
            accuracy = {precision: _figures(row, self.split) for precision, row in scores.items()}
            card = self._finish(bases, accuracy)
            provider = runtimes["fp32"].provider
        save_histogram(part / "class_counts.png", checkpoint.classes, checkpoint.train_counts)
        save_tail_shift(part / "tail_shift.png", shifted, self.split)
        manifest = {
            **card,
            "provider": provider,
            "precisions": list(options.precisions),
            "split": self.split,
            "tail_shift": {str(shift): _figures(row, self.split) for shift, row in shifted.items()},
            "config": checkpoint.config.model_dump(mode="json", exclude={"runs": True, "data": {"source", "prepared"}}),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_model_card(
            part / "README.md", manifest, {precision: (part / FILES[precision]).stat().st_size for precision in scores}
        )
        from cibl_ray.bundle.card import file_sha256

        manifest["files"] = {file.name: file_sha256(file) for file in sorted(part.iterdir()) if file.is_file()}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        self._print(scores, provider)

    def _convert(self, bases: dict[str, Path]) -> None:
        from cibl_ray.bundle.targets import this_machine
        from cibl_ray.exporting.onnx_graph import to_fp16, to_int8

        if "fp16" in self.options.precisions:
            bases["fp16"] = bases["fp32"].with_name("fp16.onnx")
            to_fp16(bases["fp32"], bases["fp16"])
        if "int8" in self.options.precisions:
            bases["int8"] = bases["fp32"].with_name("int8.onnx")
            target = self.options.target or this_machine()
            calibration = self._calibration()
            log.info("calibrating int8 for %s on %d training images, as many of each class", target, len(calibration))
            to_int8(bases["fp32"], bases["int8"], calibration, target)
            self.source = {**self.source, "int8": {"target": target, "calibration_images": len(calibration)}}

    def _finish(self, bases: dict[str, Path], accuracy: dict[str, Any]) -> dict[str, Any]:
        """Write every precision's file with its card; return fp32's."""
        from cibl_ray.bundle.card import FILES, Card
        from cibl_ray.exporting.onnx_graph import finish
        from pipelines.prepare.pictures import shot_groups

        assert self.options.name is not None
        counts = self.checkpoint.train_counts
        card = Card(
            name=self.options.name,
            precision="fp32",
            classes=self.checkpoint.classes,
            train_counts=counts.tolist(),
            groups=shot_groups(counts),
            rule=self.rule,
            accuracy=accuracy,
            source=self.source,
            versions=_versions(),
        )
        for precision, base in bases.items():
            finish(base, self.part / FILES[precision], counts, replace(card, precision=precision).dump())
        return card.dump()

    def _open(self) -> dict[str, Runtime]:
        from cibl_ray.bundle.card import FILES
        from cibl_ray.bundle.runtime import Runtime

        return {name: Runtime(self.part / FILES[name], self.options.provider) for name in self.options.precisions}

    def _first_images(self, count: int) -> np.ndarray:
        """uint8 (count, S, S, 3): the first images of the split, as evaluation sees them. Fewer where it has fewer."""
        import numpy as np

        images = next(iter(self._batches(self.split)))[0][:count]
        return np.asarray(images)

    def _calibration(self) -> np.ndarray:
        """uint8 (n, S, S, 3): training images, as many of each class (or all that it has), in an order that mixes classes."""
        import numpy as np

        from pipelines.loaders.eval_loader import eval_image

        beton = self.prepared.beton("train")
        wanted = max(1, -(-self.options.calibration // len(self.prepared.classes)))
        chosen = [np.flatnonzero(beton.labels == label)[:wanted] for label in range(len(self.prepared.classes))]
        turns = [rows[turn] for turn in range(wanted) for rows in chosen if turn < len(rows)]
        return np.stack([eval_image(beton, int(row), self.rule) for row in turns[: max(self.options.calibration, len(chosen))]])

    def _batches(self, split: str) -> Any:
        """(images uint8 (B, S, S, 3), labels int64 (B,)) of a split, as evaluation reads it."""
        from pipelines.loaders.make import make_loader
        from pipelines.loaders.reading import eval_reading

        loader = make_loader(self.prepared, split, eval_reading(self.config.data, 100), self.config.loader)
        try:
            for batch in loader.epoch(0):
                yield batch.views[:, 0].numpy().copy(), batch.labels.clone()
        finally:
            loader.close()

    def _verify_pixels(self, images: np.ndarray) -> None:
        """The server's way from an image's original file to pixels, against the evaluation's."""
        import numpy as np

        from cibl_ray.bundle.card import FORMATS
        from pipelines.pixels import BadImageError, decode
        from pipelines.prepare.originals import original_images

        foreign = []
        originals = original_images(self.prepared, self.split, self.config.data, self.config.seed, len(images))
        for row, (data, place) in enumerate(originals):
            try:
                image = decode(data, FORMATS)
            except BadImageError:
                image = decode(data)
                foreign.append(str(image.format))
            served = self.rule(image)
            if not np.array_equal(served, images[row]):
                apart = np.abs(served.astype(int) - images[row]).max()
                raise UserError(
                    f"{place}: the server's pixels differ from those evaluated, by {apart} at most; prepare the data again"
                )
        log.info("preprocessing: %d images of the %s split give the evaluation's pixels", len(images), self.split)
        if foreign:
            found, taken = ", ".join(sorted({*foreign})), ", ".join(FORMATS)
            log.warning("%d of them are %s; service and edge take %s: save such images as PNG", len(foreign), found, taken)

    def _verify_logits(self, runtime: Runtime, images: np.ndarray) -> None:
        import numpy as np
        import torch

        from cibl_ray.bundle.card import LOGITS
        from pipelines.augment.recipe import Normalize

        normalize = Normalize(self.config.data)
        start = 0
        for size in VERIFIED_BATCHES:
            batch = np.take(images, range(start, start + size), axis=0, mode="wrap")
            start += size
            with torch.inference_mode():
                expected = self.network.classify(normalize(torch.from_numpy(batch)[:, None])).numpy()
            (got,) = runtime(batch, outputs=(LOGITS,))
            apart = float(np.abs(got - expected).max())
            if not apart <= TOLERANCE or (got.argmax(1) != expected.argmax(1)).any():
                raise UserError(
                    f"verification failed: at batch {size} the logits of onnxruntime ({runtime.provider}) are "
                    f"{apart:.2g} from torch's, "
                    f"{TOLERANCE:g} at most; no bundle was written"
                )
        log.info("onnxruntime (%s) agrees with torch at batch %s", runtime.provider, ", ".join(map(str, VERIFIED_BATCHES)))

    def _measure(self, runtimes: dict[str, Runtime]) -> tuple[dict[str, Scores], dict[float, Scores]]:
        """Scores of each precision on the whole split, and of fp32 under each tail shift."""
        import numpy as np
        import torch
        from tqdm import tqdm

        from cibl_ray.bundle.card import LOGITS
        from cibl_ray.evaluation.metrics import score

        logits: dict[str, list[np.ndarray]] = {precision: [] for precision in runtimes}
        labels = []
        total = self.prepared.splits[self.split].samples
        with tqdm(total=total, desc=f"measuring on {self.split}", unit="img", leave=False, disable=None) as progress:
            for images, of_batch in self._batches(self.split):
                for precision, runtime in runtimes.items():
                    logits[precision] += runtime(images, outputs=(LOGITS,))
                labels.append(of_batch)
                progress.update(len(images))
        counts = self.checkpoint.train_counts
        true = torch.cat(labels)
        joined = {precision: torch.from_numpy(np.concatenate(parts)) for precision, parts in logits.items()}
        log_prior = torch.from_numpy(np.log(counts / counts.sum()).astype(np.float32))
        return (
            {precision: score(values, true, counts) for precision, values in joined.items()},
            {shift: score(joined["fp32"] - shift * log_prior, true, counts) for shift in SHIFTS},
        )

    def _compare(self, scores: dict[str, Scores]) -> None:
        """Refuse a precision that costs a shot group too much."""
        from pipelines.prepare.pictures import GROUPS

        for precision in scores:
            for group in ("overall", *GROUPS):
                before, after = getattr(scores["fp32"], group), getattr(scores[precision], group)
                if before is not None and 100 * (before - after) > self.options.max_drop:
                    raise UserError(
                        f"{precision} refused: {group} falls from {100 * before:.2f} % to {100 * after:.2f} % "
                        f"on the {self.split} images, "
                        f"more than {self.options.max_drop:g} points (--max-drop); leave {precision} out, "
                        "or calibrate on more images (--calibration); no bundle was written"
                    )

    def _print(self, scores: dict[str, Scores], provider: str) -> None:
        from cibl_ray.bundle.card import FILES
        from cibl_ray.evaluation.metrics import table

        sizes = {name: (self.part / FILES[name]).stat().st_size for name in scores}
        print(f"measured on {self.split} with onnxruntime, {provider}, in percent:")
        print(table({f"{name} ({sizes[name] / 1e6:.2f} MB)": row for name, row in scores.items()}))


def _figures(scores: Scores, split: str) -> dict[str, Any]:
    """The scores a client may want, as shares; None where a group is empty."""
    names = ("overall", "balanced", "many", "medium", "few", "head", "middle", "tail", "worst", "calibration_error", "samples")
    return {"split": split, **{name: getattr(scores, name) for name in names}}


def _versions() -> dict[str, str]:
    from cibl_ray.bundle.ort import onnxruntime  # several packages bring it: for CPUs, for GPUs

    packages = ("cibl-ray", "torch", "onnx", "numpy", "pillow")
    others = {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    return {package: version(package) for package in packages} | others


def _source(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    from cibl_ray.bundle.card import file_sha256

    folder = path.absolute().parent
    run = folder.parent.name if folder.name == CHECKPOINTS else folder.name
    return {"run": run, "checkpoint": path.name, "checkpoint_sha256": file_sha256(path), "epoch": checkpoint.epoch}


def _model_name(name: str) -> str:
    from cibl_ray.bundle.card import NAME

    if not NAME.fullmatch(name):
        raise UserError(f"the model's name {name!r} must be of letters, digits, '.', '_' and '-', at most 128: --name")
    return name


def _points(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError("points of accuracy, 0 to 100")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError("a number of images, 1 to 100,000")
    return value


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train,export]'")
