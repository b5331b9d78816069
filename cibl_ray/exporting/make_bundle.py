"""A checkpoint as a bundle: ONNX files, a manifest and a model card, in a folder that appears when all of it is verified."""

from __future__ import annotations

import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from cibl_ray.bundle.card import FILES, FORMATS, LOGITS, MANIFEST, NAME, Card, file_sha256
from cibl_ray.bundle.ort import onnxruntime
from cibl_ray.bundle.runtime import Provider, Runtime
from cibl_ray.bundle.targets import Target, this_machine
from cibl_ray.config import RunConfig
from cibl_ray.evaluation.metrics import Scores, score, table
from cibl_ray.exporting.onnx_graph import depthwise, export_base, finish, float_layers, to_fp16, to_int8
from cibl_ray.exporting.report import save_tail_shift, write_model_card
from cibl_ray.hardware import resolve
from cibl_ray.networks.network import HybridNetwork
from cibl_ray.run.checkpoint import Checkpoint, load_checkpoint
from cibl_ray.run.folder import CHECKPOINTS
from cibl_ray.run.images import changed
from cibl_ray.run.shift import checked_shift
from cibl_ray.tracking.trackers import track_bundle
from pipelines.augment.recipe import Normalize
from pipelines.common.errors import UserError
from pipelines.common.files import need_writable
from pipelines.common.progress import NO_BAR
from pipelines.loaders.eval_loader import eval_image
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import eval_plan, eval_rule
from pipelines.pixels import BadImageError, decode
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.originals import original_images
from pipelines.prepare.pictures import save_histogram
from pipelines.prepare.prepared import Prepared
from pipelines.prepare.shots import GROUPS, shot_groups

log = logging.getLogger(__name__)

VERIFIED_BATCHES = (1, 2, 17)
TOLERANCE = 1e-4  # of fp32 logits, onnxruntime against torch
SHIFTS = tuple(step / 4 for step in range(9))  # of the table and picture of tail_shift, beside the bundle's own


@dataclass(frozen=True)
class Options:
    """What to export.

    Attributes:
        precisions: 'fp32', 'fp16' and 'int8'; fp32 must be among them.
        name: The model's name for its clients. None takes the run's.
        embedding: Whether the model has a further output: the image's unit embedding.
        target: The CPU that int8 is for. None takes this machine's.
        max_drop: Points of accuracy that a shot group may lose to fp16 or int8.
        calibration: Number of training images that calibrate int8, as many of each class.
        provider: The provider of onnxruntime that measures the bundle.
        tail_shift: What the bundle's answers have of it by default; a client's own counts from there.

    Raises:
        UserError: A value is out of its range.
    """

    precisions: tuple[str, ...] = ("fp32",)
    name: str | None = None
    embedding: bool = False
    target: Target | None = None
    max_drop: float = 1.0
    calibration: int = 512
    provider: Provider = "auto"
    tail_shift: float = 0.0

    def __post_init__(self) -> None:
        choices = {"target": (None, *get_args(Target)), "provider": get_args(Provider)}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} = {value!r}: one of {', '.join(map(repr, allowed))}")
        for name, low, high in (("max_drop", 0, 100), ("calibration", 1, 100_000)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and low <= value <= high):
                raise UserError(f"{name} = {value!r}: a number from {low:g} to {high:g}")
        checked_shift(self.tail_shift)


@dataclass(frozen=True)
class Made:
    """A bundle that was made, and how good it is.

    Attributes:
        folder: The bundle.
        split: The split that it was measured on.
        provider: The provider of onnxruntime that measured it.
        scores: The scores of each precision.
        sizes: Bytes of each precision's file.
    """

    folder: Path
    split: str
    provider: str
    scores: dict[str, Scores]
    sizes: dict[str, int]

    def table(self) -> str:
        """The scores as a table of text, in percent."""
        rows = {f"{name} ({self.sizes[name] / 1e6:.2f} MB)": row for name, row in self.scores.items()}
        return f"measured on {self.split} with onnxruntime, {self.provider}, in percent:\n{table(rows)}"


def make_bundle(checkpoint_file: Path, out: Path, options: Options, overwrite: bool = False) -> Made:
    """Export a checkpoint as a bundle (README.md of a bundle says what it holds).

    The bundle appears only when it is verified: ONNX against torch, the server's pixels against those of the evaluation, and
    the accuracy of every precision.

    Args:
        checkpoint_file: The checkpoint.
        out: The bundle's folder.
        options: What to export.
        overwrite: Whether a bundle that is there is replaced, once the new one is verified. Otherwise `out` must not exist.

    Returns:
        The bundle, and how good it is.

    Raises:
        UserError: `out` exists or cannot be written, the checkpoint cannot be exported, or a precision loses too much accuracy.
            Nothing changes.
    """
    need_writable(out.parent, f"bundle {str(out)!r}", "name another folder (--out)")
    if out.exists() and not (overwrite and (out / MANIFEST).is_file()):
        way = "; in Python overwrite=True replaces it" if (out / MANIFEST).is_file() else ""
        raise UserError(f"{str(out)!r} exists; remove it, or choose another folder (--out, in Python out=){way}")
    checkpoint = load_checkpoint(checkpoint_file)
    source = _source(checkpoint_file, checkpoint)
    if (origin := checkpoint.config.network.backbone.origin()) is not None:
        source["pretrained"] = asdict(origin)
    if (start := checkpoint.config.train.start) is not None:
        source["start"] = _run_name(start) if start.suffix == ".safetensors" else start.name
    name = _model_name(options.name or source["run"])
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    earlier = part.with_name(f"{part.name}.earlier")
    try:
        made = _Export(checkpoint, replace(options, name=name), source, part).make()
        part.chmod(0o755)
        if out.exists():
            out.replace(earlier)
        part.replace(out)
    finally:
        for folder in (part, earlier):
            shutil.rmtree(folder, ignore_errors=True)
    if (place := checkpoint_file.absolute().parent).name == CHECKPOINTS:
        track_bundle(checkpoint.config, place.parent, out)
    return replace(made, folder=out)


class _Export:
    """One export, into the folder `part`."""

    def __init__(self, checkpoint: Checkpoint, options: Options, source: dict[str, Any], part: Path) -> None:
        self.checkpoint, self.options, self.source, self.part = checkpoint, options, source, part
        self.config: RunConfig = resolve(checkpoint.config.with_train(device="cpu", precision="fp32"))
        self.rule = eval_rule(self.config.data)
        self.prepared: Prepared = ensure_prepared(self.config.data, self.config.seed, settable=False)
        if self.prepared.classes != checkpoint.classes:
            raise UserError("the data's classes are no longer those the checkpoint was trained on")
        self.split = "test" if "test" in self.prepared.splits else "val"
        if difference := changed(checkpoint, self.prepared, self.split):
            log.warning(difference)
            self.source = {**source, "images": difference}
        self.network: HybridNetwork = checkpoint.network().eval()

    def make(self) -> Made:
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
            if "int8" in scores and (loss := self._loss(scores, "int8")) and (kept := depthwise(bases["fp32"])):
                log.warning("int8: %s; its %d depthwise convolutions stay in float32", loss, len(kept))
                self._to_int8(bases, float_depthwise=True)
                self._finish(bases, accuracy={})
                runtimes = self._open()
                scores, shifted = self._measure(runtimes)
            self._compare(scores)
            accuracy = {precision: _figures(row, self.split) for precision, row in scores.items()}
            card = self._finish(bases, accuracy)
            provider = runtimes["fp32"].provider
        save_histogram(part / "class_counts.png", checkpoint.classes, checkpoint.train_counts)
        save_tail_shift(part / "tail_shift.png", shifted, self.split, options.tail_shift)
        manifest = {
            **card,
            "provider": provider,
            "precisions": list(options.precisions),
            "split": self.split,
            "per_class": {precision: row.per_class for precision, row in scores.items()},
            "tail_shift": {str(shift): _figures(row, self.split) for shift, row in shifted.items()},
            "config": checkpoint.config.model_dump(
                mode="json", exclude={"runs": True, "data": {"source", "prepared"}, "train": {"start"}}
            ),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        sizes = {precision: (part / FILES[precision]).stat().st_size for precision in scores}
        write_model_card(part / "README.md", manifest, sizes)
        manifest["files"] = {file.name: file_sha256(file) for file in sorted(part.iterdir()) if file.is_file()}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        return Made(part, self.split, provider, scores, sizes)

    def _convert(self, bases: dict[str, Path]) -> None:
        if "fp16" in self.options.precisions:
            bases["fp16"] = bases["fp32"].with_name("fp16.onnx")
            to_fp16(bases["fp32"], bases["fp16"])
        if "int8" in self.options.precisions:
            bases["int8"] = bases["fp32"].with_name("int8.onnx")
            self._to_int8(bases)

    def _to_int8(self, bases: dict[str, Path], float_depthwise: bool = False) -> None:
        target = self.options.target or this_machine()
        calibration = self._calibration()
        log.info("calibrating int8 for %s on %d training images, as many of each class", target, len(calibration))
        to_int8(bases["fp32"], bases["int8"], calibration, target, float_depthwise)
        kept = float_layers(bases["int8"])
        if kept.share > 0.5 and not float_depthwise:  # else it was said of the first try
            log.warning(
                "int8: %.0f %% of the weights stay in float32, because linear layers are not converted; "
                "fp16 makes a smaller file",
                100 * kept.share,
            )
        of_int8 = {
            "target": target,
            "calibration_images": len(calibration),
            "float_layers": {"convolutions": kept.convolutions, "linear": kept.linear},
            "float_share": round(kept.share, 4),
        }
        self.source = {**self.source, "int8": of_int8}

    def _finish(self, bases: dict[str, Path], accuracy: dict[str, Any]) -> dict[str, Any]:
        """Write every precision's file with its card; return fp32's."""
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
            tail_shift=self.options.tail_shift,
        )
        for precision, base in bases.items():
            finish(
                base, self.part / FILES[precision], counts, replace(card, precision=precision).dump(), self.options.tail_shift
            )
        return card.dump()

    def _open(self) -> dict[str, Runtime]:
        return {name: Runtime(self.part / FILES[name], self.options.provider) for name in self.options.precisions}

    def _first_images(self, count: int) -> np.ndarray:
        """uint8 (count, S, S, 3): the first images of the split, as evaluation sees them. Fewer where it has fewer."""
        images = next(iter(self._batches(self.split)))[0][:count]
        return np.asarray(images)

    def _calibration(self) -> np.ndarray:
        """uint8 (n, S, S, 3): training images, as many of each class (or all that it has), in an order that mixes classes."""
        beton = self.prepared.beton("train")
        wanted = max(1, -(-self.options.calibration // len(self.prepared.classes)))
        chosen = [np.flatnonzero(beton.labels == label)[:wanted] for label in range(len(self.prepared.classes))]
        turns = [rows[turn] for turn in range(wanted) for rows in chosen if turn < len(rows)]
        return np.stack([eval_image(beton, int(row), self.rule) for row in turns[: max(self.options.calibration, len(chosen))]])

    def _batches(self, split: str) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(images uint8 (B, S, S, 3), labels int64 (B,)) of a split, as evaluation reads it."""
        loader = make_loader(self.prepared, split, eval_plan(self.config.data, 100), self.config.loader)
        try:
            for batch in loader.epoch(0):
                yield batch.views[:, 0].numpy().copy(), batch.labels.clone()
        finally:
            loader.close()

    def _verify_pixels(self, images: np.ndarray) -> None:
        """The server's way from an image's original file to pixels, against the evaluation's."""
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
            log.warning(
                "%d of them are %s: the service takes %s, and what --formats adds",
                len(foreign),
                found,
                taken,
            )

    def _verify_logits(self, runtime: Runtime, images: np.ndarray) -> None:
        normalize = Normalize(self.config.data)
        start = 0
        for size in VERIFIED_BATCHES:
            batch = np.take(images, range(start, start + size), axis=0, mode="wrap")
            start += size
            with torch.inference_mode():
                expected = self.network.classify(normalize(torch.from_numpy(batch)[:, None])).numpy()
            (got,) = runtime(batch, np.array([-self.options.tail_shift], np.float32), (LOGITS,))  # back to what torch gives
            apart = float(np.abs(got - expected).max())
            if not apart <= TOLERANCE or (got.argmax(1) != expected.argmax(1)).any():
                raise UserError(
                    f"verification failed: at batch {size} the logits of onnxruntime ({runtime.provider}) are "
                    f"{apart:.2g} from torch's, "
                    f"{TOLERANCE:g} at most; no bundle was written"
                )
        log.info("onnxruntime (%s) agrees with torch at batch %s", runtime.provider, ", ".join(map(str, VERIFIED_BATCHES)))

    def _measure(self, runtimes: dict[str, Runtime]) -> tuple[dict[str, Scores], dict[float, Scores]]:
        """Scores of each precision on the whole split, and of fp32 under each tail shift, smallest first."""
        logits: dict[str, list[np.ndarray]] = {precision: [] for precision in runtimes}
        labels = []
        total = self.prepared.splits[self.split].samples
        with tqdm(total=total, desc=f"measuring on {self.split}", unit="img", leave=False, disable=NO_BAR) as progress:
            for images, of_batch in self._batches(self.split):
                for precision, runtime in runtimes.items():
                    logits[precision] += runtime(images, outputs=(LOGITS,))
                labels.append(of_batch)
                progress.update(len(images))
        counts = self.checkpoint.train_counts
        true, default = torch.cat(labels), float(self.options.tail_shift)
        joined = {precision: torch.from_numpy(np.concatenate(parts)) for precision, parts in logits.items()}
        log_prior = torch.from_numpy(np.log(counts / counts.sum()).astype(np.float32))
        return (
            {precision: score(values, true, counts) for precision, values in joined.items()},
            {
                shift: score(joined["fp32"] - (shift - default) * log_prior, true, counts)
                for shift in sorted({*SHIFTS, default})
            },
        )

    def _compare(self, scores: dict[str, Scores]) -> None:
        """Refuse a precision that costs a shot group too much."""
        for precision in scores:
            if loss := self._loss(scores, precision):
                raise UserError(
                    f"{precision} refused: {loss}, more than {self.options.max_drop:g} points "
                    "(--max-drop, in Python max_drop=); "
                    f"leave {precision} out, or calibrate on more images (--calibration, in Python calibration=); "
                    "no bundle was written"
                )

    def _loss(self, scores: dict[str, Scores], precision: str) -> str:
        """The first group that a precision costs too much, in words; empty where none is."""
        for group in ("overall", *GROUPS):
            before, after = getattr(scores["fp32"], group), getattr(scores[precision], group)
            if before is not None and 100 * (before - after) > self.options.max_drop:
                return f"{group} falls from {100 * before:.2f} % to {100 * after:.2f} % on the {self.split} images"
        return ""


def _figures(scores: Scores, split: str) -> dict[str, Any]:
    """The scores a client may want, as shares; None where a group is empty."""
    names = ("overall", "balanced", "many", "medium", "few", "head", "middle", "tail", "worst", "calibration_error", "samples")
    return {"split": split, **{name: getattr(scores, name) for name in names}}


def _versions() -> dict[str, str]:
    packages = ("cibl-ray", "torch", "onnx", "numpy", "pillow")
    others = {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    return {package: version(package) for package in packages} | others


def _source(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "run": _run_name(path.absolute()),
        "checkpoint": path.name,
        "checkpoint_sha256": file_sha256(path),
        "epoch": checkpoint.epoch,
    }


def _run_name(checkpoint: Path) -> str:
    """The name of a checkpoint's run folder, or of the folder that it lies in."""
    folder = checkpoint.parent
    return folder.parent.name if folder.name == CHECKPOINTS else folder.name


def _model_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(
            f"the model's name {name!r} must be of letters, digits, '.', '_' and '-', at most 128; choose another "
            "(--name, in Python name=)"
        )
    return name
