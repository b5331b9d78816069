"""The training loop. It does not depend on Ray, nor on which loader or loss runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from cibl_ray.config import RunConfig
from cibl_ray.evaluation.metrics import Scores
from cibl_ray.features.folds import FoldFeatures
from cibl_ray.features.loader import FeatureLoaders
from cibl_ray.hardware import enough_memory, one_thread
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.average import WeightAverage
from cibl_ray.networks.network import HybridNetwork, build_network
from cibl_ray.run.checkpoint import Checkpoint, load_optimizer, load_weights, optimizer_state, save_checkpoint
from cibl_ray.run.fingerprint import code_digest
from cibl_ray.run.folder import BEST, CHECKPOINTS, LAST
from cibl_ray.run.log import RunLog
from cibl_ray.run.progress import Progress, Silent, epoch_line
from cibl_ray.run.start import read_start, start_from
from cibl_ray.run.stop import Stop
from cibl_ray.tracking.trackers import Trackers
from cibl_ray.training.advice import FirstSteps
from cibl_ray.training.batch_norm import average_statistics, keeps_statistics, several_values, sync_batch_norm
from cibl_ray.training.compiled import compile_network, explained
from cibl_ray.training.evaluator import Evaluator
from cibl_ray.training.feed import open_features, open_images
from cibl_ray.training.finite import FiniteLoss
from cibl_ray.training.optimizer import make_optimizer
from cibl_ray.training.passes import Passes, passes
from cibl_ray.training.pauses import AllStopped, Pauses
from cibl_ray.training.schedules import lr_factor
from cibl_ray.training.setup import checkpoint_activations, settle, start_heads
from cibl_ray.training.step import Step
from cibl_ray.training.tau import normalize_head
from cibl_ray.training.totals import EpochTotals
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.common.seeding import torch_seed
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)

_Tensors = dict[str, torch.Tensor]


class Trainer:
    """One run: data, network, optimizer, and how far it is trained.

    Each worker has a trainer, all with the same network. Only rank 0's writes to the folder.

    Args:
        config: The run's configuration, resolved for this machine (`hardware.resolve`).
        prepared: The images.
        folder: The run folder.
        world: The workers; None: this process alone.
        resume_from: The checkpoint that `restore` will be called with; None: the run is new, and its network has the weights of
            `train.start` or the backbone's pretrained ones.
        stop: Asks the run to stop; None: nothing does.
        features: Of the images, for a head that is trained on a part of them: then the backbone's weights stay random, as
            nothing reads them. None: the backbone computes features where the run needs some.

    Attributes:
        epoch: Whole epochs done.
        step: Steps done of the next epoch.
        features: Of the images, where a head is trained on them; else None.
        trackers: Where rank 0 sends each epoch's numbers.
        keep_best: Whether the epoch that is best on validation is kept as a checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        folder: Path,
        world: World | None = None,
        resume_from: Checkpoint | None = None,
        stop: Stop | None = None,
        features: FoldFeatures | None = None,
    ) -> None:
        self.world = world = world or World()
        self.config = config = settle(config, prepared, world)
        train = config.train
        self.prepared, self.folder = prepared, folder
        self.code = code_digest()  # before a long run's source files can change
        self.device = torch.device(train.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # a run has two or three shapes: the fastest convolutions are found once
        is_new = resume_from is None and features is None
        first_stage = self._read_first_stage() if is_new else None
        self.network = self._make_network(first_stage, pretrained=is_new and first_stage is None)
        self.features = self._set_up_network(resume_from, features)
        streams = (
            open_features(config, prepared, world, self.features)
            if self.features is not None
            else open_images(config, prepared, self.device, world)
        )
        self.normalize, self.feeds = streams.normalize, streams.feeds
        self.train_loaders = [feed.loader for feed in streams.feeds]
        self.pauses = Pauses(world, train.checkpoint_minutes, stop or Stop())
        self.evaluator = Evaluator(config, prepared, streams.held_out, self.normalize, world, self.pauses)
        if first_stage is not None and train.head_start == "tau_normalized":
            self._tau_normalize()
        self.average = WeightAverage(self.network, train.average) if train.average is not None else None
        compared = train.batch_size if train.contrast_set == "step" else train.batch_size // train.accumulate
        self.objective = Objective(config.loss, self.network, prepared.train_counts, self.device, world, compared)
        self.optimizer = make_optimizer(self.network, config.optimizer, fused=self.device.type == "cuda")
        batches = self.train_loaders[0].batches
        self._step = Step(self.config, self.network, self.objective, self.optimizer, self.average, world, batches)
        self.epoch = self.step = 0
        self.after_save: Callable[[], None] = lambda: None
        self.trackers = Trackers([])
        self.spent = {"evaluation": 0.0, "checkpoint": 0.0}  # seconds since the last epoch's row
        self.best: dict[str, float] | None = None
        self.keep_best = True
        self._rows: list[dict[str, Any]] | None = None  # of the checkpoint's log
        self._so_far: dict[str, dict[str, float]] = {}  # sums of the epoch that a checkpoint is within
        self._log: RunLog | None = None
        self._first_steps: FirstSteps | None = None
        if train.compile is True:
            for network in self.objective.networks:
                compile_network(network, self.device)

    def _read_first_stage(self) -> Checkpoint | None:
        """The checkpoint that `train.start` names. Read by rank 0 alone: another node may not have the folder."""
        place = self.config.train.start
        return self.world.broadcast_from_rank0(lambda: read_start(place)) if place is not None else None

    def _make_network(self, first_stage: Checkpoint | None, pretrained: bool) -> HybridNetwork:
        """The network with its first weights, of a first stage or of the backbone's pretrained ones."""
        config, train = self.config, self.config.train
        classes, needs, size = len(self.prepared.classes), config.loss.needs, config.data.size
        network = build_network(config.network, classes, needs, config.seed, pretrained, size)
        if first_stage is not None:
            assert train.start is not None
            keep_head = train.head_start in ("auto", "tau_normalized")
            start_from(network, first_stage, train.start, self.prepared, keep_head)
        return network

    def _set_up_network(
        self, resume_from: Checkpoint | None, features: FeatureLoaders | FoldFeatures | None
    ) -> FeatureLoaders | FoldFeatures | None:
        """Start the head, choose what is trained, and move the network to its device.

        Returns:
            The features of the images, where a head is trained on them; else None.
        """
        config, train = self.config, self.config.train
        if resume_from is None and train.head_start in ("class_means", "trained"):
            features = features or self._feature_loaders()  # of the backbone as it is, without adapters
            start_heads(self.network, config, features, self.world, self.device)
            self.network.head.set_cap()
        self.network.freeze(train.tune, train.partial, keeps_statistics(config), config.seed)
        if resume_from is not None:
            load_weights(self.network, resume_from)  # before features are made of it
        if train.checkpoint_activations:
            checkpoint_activations(self.network.backbone, config.network.backbone.title)
        if train.batch_norm == "sync":
            sync_batch_norm(self.network, self.world)
        self.network.to(self.device)
        return (features or self._feature_loaders()) if train.tune == "head" else None

    def _tau_normalize(self) -> None:
        """τ-normalise the head, and note the τ that was chosen in the configuration."""
        tau = normalize_head(self.network, self.config.train.tau, self.evaluator, self.prepared, self.world)
        self.network.head.set_cap()
        self.config = self.config.with_train(tau=tau)

    def _feature_loaders(self) -> FeatureLoaders:
        self.network.to(self.device)
        return FeatureLoaders(self.network.backbone, self.config, self.prepared, self.device, self.world)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint.

        Args:
            checkpoint: The checkpoint.

        Raises:
            UserError: It is of another network or of other data, or of more epochs than the run is to have.
        """
        splits = self.prepared.splits
        if set(checkpoint.data) != set(splits) or not all(splits[name].has(digest) for name, digest in checkpoint.data.items()):
            raise UserError("the data have changed since this run began; start a new run")
        if self.config.train.epochs < checkpoint.epoch:
            raise UserError(
                f"train.epochs is {self.config.train.epochs}, and {checkpoint.epoch} epochs are done; give as many or more"
            )
        before, now = checkpoint.config.optimizer.kind, self.config.optimizer.kind
        if before != now:
            raise UserError(
                f"the run was trained by optimizer.kind {before!r}, whose state {now!r} cannot continue; resume with "
                f"{before!r}, or start a new run from its weights: --train.start RUN"
            )
        load_weights(self.network, checkpoint)
        load_optimizer(self.network, self.optimizer, checkpoint.optimizer)
        self.objective.load(checkpoint.objective)
        if self.average is not None:  # of the weights from here on, where the run kept none before
            load_weights(self.average.network, checkpoint, averaged=True)
        self.epoch, self.step, self.best = checkpoint.epoch, checkpoint.step, checkpoint.best
        self._rows = checkpoint.rows
        self._so_far = checkpoint.so_far if checkpoint.config.loss == self.config.loss else {}  # else they are of other terms
        workers = checkpoint.workers or self.world.size
        same = _batches(checkpoint.config, workers) == _batches(self.config, self.world.size)
        if self.step and (not same or self.step >= self.train_loaders[0].batches):
            log.warning("batches are no longer those of the checkpoint, taken at step %d: its epoch starts again", self.step)
            self.step, self._so_far = 0, {}
        if self.step:
            self.objective.continue_epoch(self.epoch / self.config.train.epochs)

    def fit(self, progress: Progress | None = None) -> dict[str, Any]:
        """Train to the last epoch. Every worker calls it.

        Args:
            progress: Shows the progress; None: nothing does.

        Returns:
            On rank 0 the last epoch and the best on validation, scored on the test set; elsewhere an empty dict.
        """
        progress = progress or Silent()
        epochs, batches = self.config.train.epochs, self.train_loaders[0].batches
        run_log = None
        if self.world.is_rank0:
            run_log = self._log = RunLog(self.folder, self.epoch, self._rows, self.trackers.row)
            self.trackers.begin(self.epoch, run_log.rows)
        images = batches * self.config.train.batch_size
        left = (epochs - self.epoch) * batches - self.step
        alone, resumed = self.world.size == 1, self.epoch + self.step > 0
        self._first_steps = FirstSteps(self.config, self.folder, left, alone, resumed) if self.world.is_rank0 else None
        progress.begin(epochs * images, self.epoch * images + self.step * self.config.train.batch_size)
        self.pauses.stop.polled = True
        try:
            self._validate_last(run_log)
            if epochs == 0 and run_log is not None:
                self.save()
            while self.epoch < epochs:
                with self._enough_memory():  # for what comes before a step, too
                    row = self.train_epoch(progress)
                try:
                    self._validate(row)
                except KeyboardInterrupt as error:  # the resumed run validates first
                    self._write(run_log, row)
                    if run_log is not None:
                        self.save()
                    if isinstance(error, AllStopped):
                        self.pauses.end()
                    raise
                self._write(run_log, row)
                # Asked here too: an epoch of one step has no place within it.
                save, stop = self.pauses.ask() if self.epoch < epochs else (True, False)
                if run_log is not None and (save or stop or self.epoch % self.config.train.checkpoint_every == 0):
                    self.save()
                progress.epoch(row, epoch_line(row, epochs))
                if stop:
                    self.pauses.end()
        finally:
            self.pauses.stop.polled = False
            progress.close()
            for loader in self.train_loaders:
                loader.close()
        try:
            # Not where a run was stopped within the epoch after the best, and resumed with fewer epochs.
            is_best = self.best is not None and self.best["epoch"] == self.epoch and self.step == 0
            best = self._checkpoints / BEST if self.best is not None and not is_best else None
            with self._timed("evaluation"):
                return self.evaluator.result(self.judged, self.epoch, is_best, best)
        finally:
            self.evaluator.close()

    def train_epoch(self, progress: Progress | None = None) -> dict[str, Any]:
        """Train one epoch, or the rest of it.

        Args:
            progress: Counts the images of each step.

        Returns:
            The epoch's row for the log: mean terms over all workers, learning rate, images a second, and where the time went.
        """
        # The matrices of a head alone are too small for several threads: these would wait for each other.
        alone = self.config.train.tune == "head" and self.network.neck is None and self.device.type == "cpu"
        with one_thread() if alone else nullcontext():
            return self._train_epoch(progress)

    def _train_epoch(self, progress: Progress | None) -> dict[str, Any]:
        number, batches, batch_size = self.epoch, self.train_loaders[0].batches, self.config.train.batch_size
        torch.manual_seed(torch_seed(self.config.seed, "epoch", number))
        self.network.train()
        first = 0 if self._so_far else self.step  # a checkpoint of an older version has no sums
        totals = EpochTotals(
            self._so_far, self.world, batch_size, self.device, self.feeds, saving=lambda: self.spent["checkpoint"]
        )
        finite = FiniteLoss(number, self.config.optimizer.lr)
        for images in zip(*(feed.steps(number, self.step) for feed in self.feeds), strict=True):
            self._schedule(number + self.step / batches)
            self._seed(number)
            totals.add(self.optimize([*images]))
            self.step += 1
            if self.step == batches:
                finite.check(totals.loss, self.step)
            else:
                finite.watch(totals.loss, self.step)
            if progress is not None:
                progress.advance(batch_size)
            self.pauses.step()
            self._say_first_steps()
            if self.step < batches:
                self._save_or_stop(finite, totals)
        self.epoch, self.step, self._so_far = number + 1, 0, {}
        self._average_statistics()
        sums = totals.sums()
        return {
            "epoch": self.epoch,
            "code": self.code,
            "train": {name: total / (batches - first) for name, total in sums["terms"].items()},
            "rate": {
                "lr": self._rate(number + (batches - 1) / batches),
                "images_per_s": (batches - first) * batch_size / sums["seconds"]["epoch"],
            },
            "seconds": sums["seconds"],
        }

    def _seed(self, epoch: int) -> None:
        """Seed what a step draws by itself, such as dropout: a resumed run draws the same, each worker something of its own."""
        seed = torch_seed(self.config.seed, "step", epoch, self.step, self.world.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 100 µs without a GPU, as long as a head's step
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def optimize(self, streams: list[Images]) -> dict[str, torch.Tensor]:
        """Train one step.

        Args:
            streams: The images of each stream, ready for the network.

        Returns:
            The terms of the loss by name, detached scalars.

        Raises:
            UserError: There is too little memory, a batch norm has one value a channel, or the network cannot be compiled.
        """
        with self._enough_memory(), explained(), several_values():
            return self._step(streams, self.epoch, self.step)

    @property
    def passes(self) -> Passes:
        """The views that the epochs so far passed through the network, of all workers."""
        return passes(self.config, self.train_loaders[0].batches, self.epoch)

    @property
    def judged(self) -> HybridNetwork:
        """The network that is evaluated and exported: the trained one, or its average."""
        return self.network if self.average is None else self.average.network

    def evaluate(self, split: str) -> Scores | None:
        """Score the network on a split, each image once over all workers.

        Args:
            split: 'val' or 'test'.

        Returns:
            The scores on rank 0; elsewhere None.
        """
        with self._timed("evaluation"):
            return self.evaluator.score(self.judged, split, self.epoch)

    def save(self) -> None:
        """Write the checkpoint that `--resume` continues from."""
        with self._timed("checkpoint"):
            whole = self._checkpoint(
                self.network.state_dict(),
                rows=self._log.rows if self._log is not None else self._rows,
                so_far=self._so_far,
                optimizer=optimizer_state(self.network, self.optimizer),
                objective=self.objective.state(),
                average=self.average.network.state_dict() if self.average is not None else {},
            )
            save_checkpoint(self._checkpoints / LAST, whole, keep_previous=True)
            self.after_save()
        self.pauses.saved()

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Count the context's seconds as spent on `what`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - started

    def _enough_memory(self) -> AbstractContextManager[None]:
        size = self.config.train.batch_size
        return enough_memory(f"a step of {size} images", "lower train.batch_size, raise train.accumulate, or use more workers")

    def _say_first_steps(self) -> None:
        if self._first_steps is None or self._first_steps.done:
            return
        for text in self._first_steps.step():
            log.warning(text)

    def _save_or_stop(self, finite: FiniteLoss, totals: EpochTotals) -> None:
        """Within an epoch: save where a checkpoint is due, save and raise KeyboardInterrupt where the run is asked to stop."""
        save, stop = self.pauses.ask()
        if not (save or stop):
            return
        finite.check(totals.loss, self.step)  # no checkpoint of a loss that is not finite
        self._average_statistics()
        self._so_far = totals.sums()
        if self.world.is_rank0:
            self.save()
        if stop:
            self.pauses.end()

    def _average_statistics(self) -> None:
        networks = self.objective.networks
        average_statistics(networks if self.average is None else [*networks, self.average.network], self.world)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def _schedule(self, epoch: float) -> None:
        """Set what follows a schedule, for a step at `epoch` (fractional)."""
        self.network.schedule(epoch, self.config.train.epochs)
        rate = self._rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def _rate(self, epoch: float) -> float:
        """The learning rate of a step at `epoch` (fractional), before the factors of the parameter groups."""
        return self.config.optimizer.lr * lr_factor(self.config.schedule, epoch, self.config.train.epochs)

    def _write(self, run_log: RunLog | None, row: dict[str, Any]) -> None:
        """An epoch's row; before its checkpoint: a resumed run drops rows beyond that, and misses none."""
        row["seconds"] |= self.spent
        self.spent = dict.fromkeys(self.spent, 0.0)
        if run_log is not None:
            run_log.write(row)

    @property
    def _evaluates(self) -> bool:
        """Whether the epoch that ended is scored on the validation split."""
        train = self.config.train
        return "val" in self.prepared.splits and (self.epoch % train.evaluate_every == 0 or self.epoch == train.epochs)

    def _validate_last(self, run_log: RunLog | None) -> None:
        """Validate the last epoch where the run was stopped before that."""
        if self.step or not self._evaluates:
            return
        row = self.world.broadcast_from_rank0(lambda: run_log.last_without("val", self.epoch) if run_log is not None else None)
        if row is None:
            return
        self._validate(row)
        row["seconds"] = {name: seconds + self.spent.get(name, 0.0) for name, seconds in row["seconds"].items()}
        self.spent = dict.fromkeys(self.spent, 0.0)
        if run_log is not None:
            run_log.replace_last(row)
            self.save()  # it says which epoch is the best

    def _validate(self, row: dict[str, Any]) -> None:
        """Add the scores on the validation split, where there is one, and keep the best epoch."""
        if not self._evaluates:
            return
        scores = self.evaluate("val")
        if scores is None:
            return
        row["val"] = scores.numbers()
        # The class mean: a validation split carved out of unbalanced data must not favour the head.
        if self.keep_best and (self.best is None or scores.balanced > self.best["balanced"]):
            self.best = {"epoch": self.epoch, "balanced": scores.balanced}
            with self._timed("checkpoint"):
                save_checkpoint(self._checkpoints / BEST, self._checkpoint(self.judged.state_dict()))

    def _checkpoint(
        self,
        weights: _Tensors,
        rows: list[dict[str, Any]] | None = None,
        so_far: dict[str, dict[str, float]] | None = None,
        **more: _Tensors,
    ) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            classes=self.prepared.classes,
            train_counts=self.prepared.train_counts,
            data=self.prepared.digests,
            epoch=self.epoch,
            step=self.step,
            workers=self.world.size,
            best=self.best,
            rows=rows,
            so_far=so_far or {},
            place=None,
            weights=weights,
            **more,
        )


def _batches(config: RunConfig, workers: int) -> tuple[object, ...]:
    """What the batches of an epoch follow from."""
    loader, data = config.loader, config.data.model_dump(mode="json")
    data["source"].pop("expect", None)
    pages = loader.read_ahead_mb if loader.cache == "process" else None
    return config.train.batch_size, config.seed, data, pages, workers if loader.part == "shards" else None
