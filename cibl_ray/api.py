"""The Python interface: what `import cibl_ray` offers. It trains in this process and changes nothing else in it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from cibl_ray.config import RunConfig, configured
from cibl_ray.evaluation.classify import Prediction, Unreadable, classify, from_checkpoint, image_files
from cibl_ray.evaluation.evaluate import evaluate
from cibl_ray.networks.network import HybridNetwork
from cibl_ray.run.checkpoint import Checkpoint, load_checkpoint
from cibl_ray.run.folder import CONFIG, RESULT, is_run, no_run
from cibl_ray.run.log import read_metrics
from cibl_ray.run.own_config import own_config
from cibl_ray.run.progress import Silent, Terminal
from cibl_ray.run.shift import checked_shift, chosen_shift
from cibl_ray.run.which import checkpoint
from cibl_ray.training import fit as training
from cibl_ray.training.resume import need_same_images, resumed
from cibl_ray.world import World
from pipelines.common.config_file import find_config, read_content
from pipelines.common.errors import UserError, shown
from pipelines.common.validation import validate
from pipelines.library_warnings import collected_warnings

__all__ = ["Prediction", "Run", "UserError", "fit", "load_config", "open_run"]

log = logging.getLogger(__name__)

Which = Literal["best", "last"]


def load_config(name: str | Path, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Load a configuration.

    Args:
        name: A YAML file, or the name of a shipped configuration ("cifar100_lt").
        settings: Values by dotted name, which replace those of the file: {"loss.tail_skew": 0.2, "train.epochs": 20}.

    Returns:
        The configuration, with absolute paths. It cannot be changed; load it again with other settings.

    Raises:
        UserError: There is no such configuration, `settings` is no dict, or a field is unknown or has a wrong value.
    """
    path = find_config(str(name))
    return _with(read_content(path, RunConfig), settings, str(path))


def fit(config: RunConfig, name: str | None = None, *, progress: bool = True) -> Run:
    """Train a configuration in this process.

    The run folder is the same that `python -m cibl_ray.train` writes. Signal handlers, logging, memory settings and the
    random numbers of this process stay as they are. Ctrl-C raises KeyboardInterrupt; `Run.resume` resumes from the last
    checkpoint.

    Args:
        config: The configuration.
        name: The run folder's name below `config.runs`. None takes the time.
        progress: Whether to show a progress bar and a line for each epoch.

    Returns:
        The finished run.

    Raises:
        UserError: `config` is not a RunConfig, the run folder exists, the data are missing, the loss is not finite, or the
            machine lacks memory.
    """
    if not isinstance(config, RunConfig):
        fix = f"load_config({shown(str(config))})" if isinstance(config, str | Path) else "what load_config returns"
        raise UserError(f"fit takes a configuration, and got {shown(config)}; give it {fix}")
    return _fit(config, config.runs / (name or f"run-{time.strftime('%Y%m%d-%H%M%S')}"), resume=False, progress=progress)


def open_run(folder: str | Path) -> Run:
    """Open a run folder, finished or not.

    Args:
        folder: The run folder.

    Raises:
        UserError: It is not a run folder.
    """
    if not isinstance(folder, str | Path):
        raise UserError(f"open_run takes a folder, and got {shown(folder)}")
    path = Path(folder).expanduser().absolute()
    if not is_run(path):
        raise UserError(f"{str(folder)!r} {no_run(path)}")
    return Run(path)


class Run:
    """A run folder.

    Where a method takes a `checkpoint`, None stands for the best epoch on the validation split, or for the last epoch where
    none was chosen: without a validation split, and where heads are cross-validated (`train.folds`).

    Attributes:
        folder: The folder's absolute path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def config(self) -> RunConfig:
        """The configuration that was trained."""
        return validate(RunConfig, own_config(self.folder), str(self.folder / CONFIG))

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the logits."""
        return self._load(None).classes

    @property
    def result(self) -> dict[str, Any]:
        """What `result.json` holds: the scores of both checkpoints with every class, times and versions.

        Raises:
            UserError: The run is not finished.
        """
        path = self.folder / RESULT
        try:
            content = json.loads(path.read_text())
            if not all(isinstance(content[key], kind) for key, kind in (("split", str), ("last", dict), ("classes", list))):
                raise TypeError("it is not the result of a run")
        except FileNotFoundError:
            raise UserError(f"the run in {str(self.folder)!r} is not finished, it has no {RESULT}; resume it") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{str(path)!r} is damaged: {error}; resume the run to write it again") from error
        result: dict[str, Any] = content
        return result

    @property
    def scores(self) -> dict[str, float]:
        """The scores on the test split, or on the validation split where there is no test split, by name.

        Accuracies are fractions from 0 to 1: `overall`, `balanced`, `many`, `medium`, `few`, `head`, `middle`, `tail`,
        `worst`, `harmonic`; also `calibration_error` and `loss`. A group without classes is left out. `result` has the scores
        of every class.

        Raises:
            UserError: The run is not finished.
        """
        result = self.result
        kind = "best" if "best" in result else "last"
        return {name: value for name, value in result[kind]["scores"].items() if isinstance(value, float)}

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict for each epoch: `epoch`, `train` and `val` (numbers by name), `rate`, `seconds`.

        Only epochs that were evaluated on a validation split have `val` (`train.evaluate_every`).
        """
        return read_metrics(self.folder)

    def network(self, checkpoint: Which | None = None) -> HybridNetwork:
        """The trained network on the CPU, in evaluation mode.

        It maps normalised images, float32 (N, 3, S, S), to an object with `logits` (N, C) and `embeddings` (N, d), which are
        None where the loss needs no projection. `network.classify(images)` returns the logits alone.

        Args:
            checkpoint: The checkpoint.

        Raises:
            UserError: The run has no such checkpoint.
        """
        return self._load(checkpoint).network().eval()

    def evaluate(
        self,
        folder: str | Path | None = None,
        *,
        split: Literal["train", "val", "test"] | None = None,
        checkpoint: Which | None = None,
        tail_shift: float | None = 0.0,
    ) -> dict[str, float]:
        """Evaluate the run.

        Args:
            folder: An image folder, FOLDER/CLASS/*, with the class names of the run. None takes the run's own data.
            split: The split of the run's own data. None takes test, or val where there is no test split.
            checkpoint: The checkpoint.
            tail_shift: This times log π is subtracted from the logits, as in `predict`. None takes what the validation images
                chose; 0 scores the logits as they are.

        Returns:
            Scores by name, as in `scores`.

        Raises:
            UserError: The images, the split or the checkpoint are missing, the class names differ, or `tail_shift` has a
                wrong value.
        """
        if folder is not None and split is not None:
            raise UserError("split names a split of the run's own data; leave it out where a folder is given")
        images = Path(folder).expanduser() if folder is not None else None
        path = self._path(checkpoint)
        shift = _shift(path, tail_shift)
        with _same_process():
            return evaluate(load_checkpoint(path), images, split, shift).scores.numbers()

    def predict(
        self,
        images: str | Path | Image.Image | Iterable[str | Path | Image.Image],
        *,
        checkpoint: Which | None = None,
        tail_shift: float | None = None,
    ) -> list[Prediction]:
        """Classify images, as `python -m cibl_ray.predict` does.

        Args:
            images: An image file, a folder, whose images are all classified, a Pillow image, or a list of these. Of an array,
                uint8 (H, W, 3): `Image.fromarray(array)`.
            checkpoint: The checkpoint.
            tail_shift: This times log π, the classes' shares of the training images, is subtracted from the logits. None takes
                what the validation images chose; 0 leaves the logits as they are.

        Returns:
            A prediction for each image, in the same order; of a folder sorted by name.

        Raises:
            UserError: A file is missing or is not an image, a folder has none, or `tail_shift` has a wrong value.
        """
        given = images if isinstance(images, Iterable) and not isinstance(images, str) else [images]
        wanted: list[Path | Image.Image] = []
        for image in given:
            if isinstance(image, Image.Image):
                wanted.append(image)
            elif isinstance(image, str | Path):
                wanted += image_files([Path(image).expanduser()])
            else:
                raise UserError(f"predict takes image files, folders and Pillow's images, and got {shown(image)}")
        path = self._path(checkpoint)
        shift = _shift(path, tail_shift)
        predictions = []
        with _same_process(), collected_warnings() as warned:
            classifier = from_checkpoint(load_checkpoint(path), shift)
            for answer in classify(classifier, wanted, warned.begin):
                if isinstance(answer, Unreadable):
                    raise UserError(f"{str(answer.image)!r} {answer.problem}")
                predictions.append(answer)
        if text := warned.text():
            log.warning(text)
        return predictions

    def export(
        self,
        precisions: Iterable[str] = ("fp32",),
        out: str | Path | None = None,
        *,
        checkpoint: Which | None = None,
        overwrite: bool = False,
        tail_shift: float | None = None,
        **options: Any,
    ) -> Path:
        """Export the run as a bundle of ONNX files, which `python -m serve` serves.

        Args:
            precisions: 'fp32', 'fp16' and 'int8'. fp32 is always made.
            out: The bundle's folder. None takes `bundle` in the run folder.
            checkpoint: The checkpoint.
            overwrite: Whether to replace a bundle that is already there, once the new one is verified.
            tail_shift: What the bundle's answers have of it by default. None takes what the validation images chose.
            **options: Other fields of `cibl_ray.exporting.make_bundle.Options`: `name`, `embedding`, `target`, `max_drop`,
                `calibration`, `provider`.

        Returns:
            The bundle's folder.

        Raises:
            UserError: The folder exists, an option is unknown, or a precision loses too much accuracy.
        """
        from cibl_ray.exporting.make_bundle import Options, make_bundle  # needs the extra `export`

        if isinstance(precisions, str):
            precisions = [precisions]
        wanted = tuple(dict.fromkeys(["fp32", *precisions]))
        known = {*Options.__dataclass_fields__} - {"precisions", "tail_shift"}
        if unknown := [name for name in options if name not in known]:
            raise UserError(f"export has no option {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        if strange := [name for name in wanted if name not in ("fp32", "fp16", "int8")]:
            raise UserError(f"export has no precision {strange[0]!r}; there are: fp32, fp16, int8")
        folder = Path(out).expanduser().absolute() if out is not None else self.folder / "bundle"
        path = self._path(checkpoint)
        shift = _shift(path, tail_shift)
        with _same_process():
            make_bundle(path, folder, Options(precisions=wanted, tail_shift=shift, **options), overwrite)
        return folder

    def resume(self, settings: Mapping[str, Any] | None = None, *, progress: bool = True) -> Run:
        """Continue training from the last checkpoint, to the last epoch of the configuration.

        Args:
            settings: Values by dotted name, which replace those of the run: {"train.epochs": 300} trains a finished run longer.
            progress: Whether to show a progress bar and a line for each epoch.

        Returns:
            This run.

        Raises:
            UserError: A setting asks for other images, another network or fewer epochs than are done, the data have changed, or
                another process trains in the folder. Another loss or learning rate is taken, with a warning.
        """
        begun, folder = resumed(self.folder, [], None)
        config = _with(begun.model_dump(mode="json"), settings, str(folder / CONFIG))
        need_same_images(begun, config, folder)
        return _fit(config, folder, resume=True, progress=progress)

    def _path(self, which: Which | None) -> Path:
        return checkpoint(self.folder, which)

    def _load(self, which: Which | None) -> Checkpoint:
        return load_checkpoint(self._path(which))


def _fit(config: RunConfig, folder: Path, resume: bool, progress: bool) -> Run:
    with _same_process():
        training.fit(config, folder, resume, World(), Terminal() if progress else Silent())
    return Run(folder.absolute())


def _shift(path: Path, asked: float | None) -> float:
    """The tail shift: a number, or with None the one that was chosen for the checkpoint."""
    return chosen_shift(path) if asked is None else checked_shift(asked)


def _with(content: dict[str, Any], settings: Mapping[str, Any] | None, place: str) -> RunConfig:
    """A configuration with values by dotted name."""
    if not isinstance(settings, Mapping | None):
        raise UserError(f'settings is {shown(settings)}; give values by dotted name, {{"train.epochs": 20}}')
    pairs = [(str(key), _plain(value)) for key, value in (settings or {}).items()]
    where = f"{place} with {dict(pairs)}" if pairs else place
    return configured(content, pairs, where)


def _plain(value: Any) -> Any:
    """A value as a YAML file has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


@contextmanager
def _same_process() -> Iterator[None]:
    """Leave torch's random numbers and its choice of convolutions as they are."""
    benchmark = torch.backends.cudnn.benchmark
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
