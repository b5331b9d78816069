"""The training loop. It does not depend on Ray, nor on which loader or loss runs."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from cibl_ray.config import RunConfig
from cibl_ray.evaluation.metrics import Scores, score
from cibl_ray.evaluation.predict import predict
from cibl_ray.evaluation.tail_shift import choose_shift
from cibl_ray.features.folds import FoldFeatures
from cibl_ray.features.loader import AsTheyAre, FeatureLoaders
from cibl_ray.features.start import start_head
from cibl_ray.hardware import enough_memory, one_thread
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.average import WeightAverage
from cibl_ray.networks.network import HybridNetwork, Outputs, build_network
from cibl_ray.run.checkpoint import Checkpoint, load_checkpoint, load_optimizer, load_weights, optimizer_state, save_checkpoint
from cibl_ray.run.fingerprint import code_digest
from cibl_ray.run.folder import BEST, CHECKPOINTS, LAST
from cibl_ray.run.log import RunLog
from cibl_ray.run.progress import Progress, Silent
from cibl_ray.run.stop import Stop
from cibl_ray.training.advice import FirstSteps
from cibl_ray.training.compiled import begin_step, compile_network, explained
from cibl_ray.training.feed import FeatureFeed, Feed, read_plans
from cibl_ray.training.mix import mix
from cibl_ray.training.optimizer import make_optimizer
from cibl_ray.training.schedules import lr_factor
from cibl_ray.world import World
from pipelines.augment.recipe import Normalize
from pipelines.common.errors import UserError
from pipelines.common.seeding import stream, torch_seed
from pipelines.config import LoaderConfig
from pipelines.loaders.make import decide_cache, make_loader
from pipelines.loaders.reading import Batch, Loader, eval_reading
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)

_Tensors = dict[str, torch.Tensor]

_ASK_EVERY = 1.0  # seconds between the workers' questions whether to save or to stop
_ASK_STEPS = 100  # the most steps between two of them
_CHECK_EVERY = 50  # steps between looks at whether the loss is finite


class Trainer:
    """One run: data, network, optimizer, and how far it is trained.

    Each worker has a trainer, all with the same network. Only rank 0's writes to the folder.

    Args:
        config: The run's configuration, with every 'auto' resolved (`hardware.resolve`).
        prepared: The images.
        folder: The run folder.
        world: The workers; None: this process alone.
        start: The checkpoint that `restore` will resume from; None: the backbone's pretrained weights are loaded.
        features: Of the images, for a head that is trained on a part of them: then the backbone's weights stay random, as
            nothing reads them. None: the backbone computes features where the run needs some.

    Attributes:
        epoch: Whole epochs done.
        step: Steps done of the next epoch.
        features: Of the images, where a head is trained on them; else None.
        keep_best: Whether the epoch that is best on validation is kept as a checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        folder: Path,
        world: World | None = None,
        start: Checkpoint | None = None,
        features: FoldFeatures | None = None,
    ) -> None:
        self.world = world = world or World()
        config = _fitting_batch(config, prepared)
        config = config.model_copy(update={"loader": _decide_cache(config.loader, prepared, world, config.train.device)})
        self.config, self.prepared, self.folder = config, prepared, folder
        self.code = code_digest()  # before a long run's source files can change
        batch = config.train.batch_size
        if batch < world.size:
            raise UserError(f"train.batch_size is {batch}, fewer than one image for each of {world.size} workers; raise it")
        self.device = torch.device(config.train.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # a run has two or three shapes: the fastest convolutions are found once
        self.autocast = config.train.precision == "bf16"
        pretrained = start is None and features is None
        self.network = build_network(config.network, len(prepared.classes), config.loss.needs, config.seed, pretrained)
        micro, rest = divmod(batch, config.train.accumulate)
        if config.train.accumulate > 1 and (rest or micro % world.size):
            among = f" among {world.size} workers" if world.size > 1 else ""
            raise UserError(
                f"train.batch_size {batch} cannot be split evenly into train.accumulate = {config.train.accumulate} "
                f"parts{among}; change one of them"
            )
        starts = start is None and config.train.head_start != "random"
        made: FeatureLoaders | FoldFeatures | None = features
        if starts:  # from features of the backbone as it is, without adapters
            made = made or self._feature_loaders()
            self._start_head(made)
        self.network.freeze(config.train.tune, config.train.partial, _keeps_statistics(config), config.seed)
        if start is not None:
            load_weights(self.network, start)  # before features are made of it
        if config.train.checkpoint_activations:
            _checkpoint_activations(self.network.backbone, config.network.backbone.title)
        self.network.to(self.device)
        if config.train.tune == "head":
            made = made or self._feature_loaders()
        self.features = made if config.train.tune == "head" else None
        average = config.train.average
        self.average = WeightAverage(self.network, average) if average is not None else None
        self.normalize: nn.Module = Normalize(config.data).to(self.device)
        self.objective = Objective(config.loss, self.network, prepared.train_counts, self.device, world, micro)
        self.optimizer = make_optimizer(self.network, config.optimizer, fused=self.device.type == "cuda")
        self.outputs: tuple[torch.Tensor, torch.Tensor] | None = None  # logits and labels that the result scored last
        self.epoch = self.step = 0
        self._saved = time.monotonic()
        self.after_save: Callable[[], None] = lambda: None
        self.stop = Stop()
        self._until_asked, self._asked = 0, (self._saved, 0)  # steps until the next question; time and steps at the last one
        self._steps = 0  # of this process
        self.spent = {"evaluation": 0.0, "checkpoint": 0.0}  # seconds since the last epoch's row
        self.best: dict[str, float] | None = None
        self.keep_best = True
        self._rows: list[dict[str, Any]] | None = None  # of the checkpoint's log
        self._log: RunLog | None = None
        self._first_steps: FirstSteps | None = None
        plans = read_plans(config.loss, config.data, batch, config.seed, world.share)
        if config.train.compile:
            for network in self.objective.networks:
                compile_network(network, self.device)
        held_out = eval_reading(config.data, config.train.eval_batch_size, world.share)
        splits = [split for split in prepared.splits if split != "train"]
        self.train_loaders: Sequence[Loader]
        self.eval_loaders: Mapping[str, Loader]
        self.feeds: Sequence[Feed | FeatureFeed]
        if self.features is not None:
            self.autocast = False  # a head alone gains nothing by it
            self.train_loaders = [self.features.train(plan) for plan in plans]
            self.eval_loaders = {split: self.features.evaluation(split, held_out) for split in splits}
            self.feeds = [FeatureFeed(loader, self.device) for loader in self.train_loaders]
            self.normalize = AsTheyAre()
        else:
            self.train_loaders = [make_loader(prepared, "train", plan, config.loader, self.device) for plan in plans]
            self.feeds = [
                Feed(loader, plan, self.normalize, self.device, world.share.of(batch), batch)
                for loader, plan in zip(self.train_loaders, plans, strict=True)
            ]
            # Opened now, so that a damaged test set is not found out after the last epoch.
            self.eval_loaders = {split: make_loader(prepared, split, held_out, config.loader) for split in splits}

    def _feature_loaders(self) -> FeatureLoaders:
        self.network.to(self.device)
        return FeatureLoaders(self.network.backbone, self.config, self.prepared, self.device, self.world)

    def _start_head(self, features: FeatureLoaders | FoldFeatures) -> None:
        """Give every worker the head that rank 0 makes of the training images' features."""
        labels = torch.from_numpy(features.labels("train")).to(self.device)
        of_train = features.features("train")[:, 0].to(self.device)

        def made() -> _Tensors:
            start_head(self.network, self.config.train.head_start, of_train, labels, self.config.seed)
            return {
                name: value.cpu() for name, value in self.network.state_dict().items() if name.startswith(("head.", "neck."))
            }

        self.network.load_state_dict(self.world.broadcast_from_rank0(made), strict=False)
        log.info("the head starts %s", "from class means" if self.config.train.head_start == "class_means" else "trained")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint.

        Args:
            checkpoint: The checkpoint.

        Raises:
            UserError: It is of another network or of other data.
        """
        splits = self.prepared.splits
        if set(checkpoint.data) != set(splits) or not all(splits[name].has(digest) for name, digest in checkpoint.data.items()):
            raise UserError("the data have changed since this run began; start a new run")
        load_weights(self.network, checkpoint)
        load_optimizer(self.network, self.optimizer, checkpoint.momentum)
        self.objective.load(checkpoint.objective)
        if self.average is not None:  # of the weights from here on, where the run kept none before
            load_weights(self.average.network, checkpoint, averaged=True)
        self.epoch, self.step, self.best = checkpoint.epoch, checkpoint.step, checkpoint.best
        self._rows = checkpoint.rows
        workers = checkpoint.workers or self.world.size
        same = _batches(checkpoint.config, workers) == _batches(self.config, self.world.size)
        if self.step and (not same or self.step >= self.train_loaders[0].batches):
            log.warning("batches are no longer those of the checkpoint, taken at step %d: its epoch starts again", self.step)
            self.step = 0

    def fit(self, progress: Progress | None = None) -> dict[str, Any]:
        """Train to the last epoch. Every worker calls it.

        Args:
            progress: Shows the progress; None: nothing does.

        Returns:
            On rank 0 the last epoch and the best on validation, scored on the test set; elsewhere an empty dict.
        """
        progress = progress or Silent()
        epochs, batches = self.config.train.epochs, self.train_loaders[0].batches
        run_log = self._log = RunLog(self.folder, self.epoch, self._rows) if self.world.is_rank0 else None
        images = batches * self.config.train.batch_size
        left = (epochs - self.epoch) * batches - self.step
        self._first_steps = FirstSteps(self.config, self.folder, left, self.world.size == 1) if self.world.is_rank0 else None
        progress.begin(epochs * images, self.epoch * images + self.step * self.config.train.batch_size)
        self.stop.polled = True
        try:
            self._validate_last(run_log)
            while self.epoch < epochs:
                with self._enough_memory():  # for what comes before a step, too
                    row = self.train_epoch(progress)
                try:
                    self._validate(row)
                except KeyboardInterrupt:  # the resumed run validates first
                    self._write(run_log, row)
                    if run_log is not None:
                        self.save()
                    raise
                self._write(run_log, row)
                # Asked here too: an epoch of one step has no place within it.
                save, stop = self._ask() if self.epoch < epochs else (True, False)
                if run_log is not None and (save or stop or self.epoch % self.config.train.checkpoint_every == 0):
                    self.save()
                progress.epoch(row, _epoch_line(row, epochs))
                if stop:
                    self._end()
        finally:
            self.stop.polled = False
            progress.close()
            if run_log is not None:
                run_log.close()
            for loader in self.train_loaders:
                loader.close()
        try:
            return self._result()
        finally:
            for loader in self.eval_loaders.values():
                loader.close()

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
        totals: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        started = time.perf_counter()
        self.world.communication_seconds, waited = 0.0, sum(feed.waited for feed in self.feeds)
        saving = self.spent["checkpoint"]
        first = self.step
        watch: _Watch | None = None
        for images in zip(*(feed.steps(number, self.step) for feed in self.feeds), strict=True):
            self._schedule(number + self.step / batches)
            terms = self.optimize([*images])
            for name, value in terms.items():
                totals[name] += value
            self.step += 1
            if self.step == batches:
                self._check_finite(totals["loss"], self.step)
            elif self.step % _CHECK_EVERY == 0:
                if watch is not None:
                    watch.look()
                watch = _Watch(totals["loss"], partial(self._check_finite, step=self.step))
            if progress is not None:
                progress.advance(batch_size)
            self._steps += 1
            self._say_first_steps()
            if self.step < batches:
                self._save_or_stop(totals["loss"])
        self.epoch, self.step = number + 1, 0
        self._average_statistics()
        own = torch.stack([total.float() for total in totals.values()]) * self.world.fraction(batch_size)
        means = (self.world.sum(own) / (batches - first)).tolist()
        seconds = time.perf_counter() - started - (self.spent["checkpoint"] - saving)
        return {
            "epoch": self.epoch,
            "code": self.code,
            "train": dict(zip(totals, means, strict=True)),
            "rate": {
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "images_per_s": (batches - first) * batch_size / seconds,
            },
            "seconds": {
                "epoch": seconds,
                "data_wait": sum(feed.waited for feed in self.feeds) - waited,
                "communication": self.world.communication_seconds,
            },
        }

    def train_step(self, batches: Sequence[Batch], step: int) -> dict[str, torch.Tensor]:
        """Train one step.

        Args:
            batches: One batch of each stream.
            step: The number of the step in the epoch.

        Returns:
            The terms of the loss by name, detached scalars.
        """
        return self.optimize(
            [feed.ready([batch], self.epoch, step)[0] for batch, feed in zip(batches, self.feeds, strict=True)]
        )

    def optimize(self, streams: list[Images]) -> dict[str, torch.Tensor]:
        """Train one step on images that are ready for the network.

        Args:
            streams: The images of each stream.

        Returns:
            As `train_step`.

        Raises:
            UserError: There is too little memory, or the network cannot be compiled.
        """
        with self._enough_memory(), explained():
            return self._optimize(streams)

    def _optimize(self, streams: list[Images]) -> dict[str, torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)  # first: memory of CUDA graphs is used again in every step
        begin_step(self.config.train.compile)
        parts = self.config.train.accumulate
        terms: _Tensors = {}
        progress = self.epoch / self.config.train.epochs
        for number, part in enumerate(zip(*(images.split(parts) for images in streams), strict=True)):
            mixed = [self._mixed(images, number) for images in part]
            of_part = self.objective(self.network, self._run, mixed, progress)
            # Each worker's loss is the mean over its own images; the parts add up to the mean over the batch.
            (of_part["loss"] * self.world.fraction(self.config.train.batch_size) / parts).backward()
            for name, term in of_part.items():
                mean = term.detach() / parts
                terms[name] = terms[name] + mean if name in terms else mean
        self.world.sum_gradients(self.network.parameters())
        if self.config.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network, self.epoch * self.train_loaders[0].batches + self.step + 1)
        return terms

    def _mixed(self, images: Images, part: int) -> Images:
        """A micro-batch's images, mixed with each other where the run asks for that."""
        train = self.config.train
        if not (train.mixup or train.cutmix):
            return images
        rank = self.world.share.of(train.batch_size).start
        draw = stream(self.config.seed, "mix", self.epoch, self.step, part, rank)
        return mix(images, train.mixup, train.cutmix, draw)

    def _enough_memory(self) -> AbstractContextManager[None]:
        size = self.config.train.batch_size
        return enough_memory(f"a step of {size} images", "lower train.batch_size, raise train.accumulate, or use more workers")

    def _run(self, network: nn.Module, pixels: torch.Tensor) -> Outputs:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            outputs: Outputs = network(pixels)
        return outputs

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
        return self._score(split, *self._predict(split))

    def _score(self, split: str, logits: torch.Tensor, labels: torch.Tensor) -> Scores | None:
        """Scores of rank 0's logits. Raises UserError where they are not finite."""
        scores = score(logits, labels, self.prepared.train_counts) if self.world.is_rank0 else None
        # Training uses each batch's statistics and may stay finite. Running statistics that are not finite stay so.
        if scores is not None and not math.isfinite(scores.loss):
            raise UserError(
                f"the loss is not finite on the {split} split after epoch {self.epoch}, though it is in training; lower "
                f"optimizer.lr (it is {self.config.optimizer.lr}), set optimizer.clip_norm, or train.precision: fp32; "
                "earlier checkpoints are kept"
            )
        return scores

    def _predict(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of the network as it is, of the whole split on rank 0."""
        started = time.perf_counter()
        with enough_memory(f"evaluation, {self.config.train.eval_batch_size} images at once", "lower train.eval_batch_size"):
            loader = self.eval_loaders[split]
            logits, labels = predict(self.judged, loader, self.normalize, self.device, self._raise_if_stopped)
        logits, labels = self.world.gather_to_rank0(logits), self.world.gather_to_rank0(labels)
        self.spent["evaluation"] += time.perf_counter() - started
        return logits, labels

    def _scored(self, split: str, epoch: int) -> dict[str, Any]:
        """What the result says of the network as it is, with the tail shift that validation images choose."""
        logits, labels = self._predict(split)
        result: dict[str, Any] = {"epoch": epoch, "scores": self._score(split, logits, labels)}
        self.outputs = logits, labels
        if "val" in self.prepared.splits and split != "val":
            logits, labels = self._predict("val")
            if self.world.is_rank0:
                result["tail_shift"] = choose_shift(logits, labels, self.prepared.train_counts)
        return result

    def save(self) -> None:
        """Write the checkpoint that `--resume` continues from."""
        started = time.perf_counter()
        whole = self._checkpoint(
            self.network.state_dict(),
            rows=self._log.rows if self._log is not None else self._rows,
            momentum=optimizer_state(self.network, self.optimizer),
            objective=self.objective.state(),
            average=self.average.network.state_dict() if self.average is not None else {},
        )
        save_checkpoint(self._checkpoints / LAST, whole, keep_previous=True)
        self.after_save()
        self._saved = time.monotonic()
        self.spent["checkpoint"] += time.perf_counter() - started

    def _say_first_steps(self) -> None:
        if self._first_steps is None or self._first_steps.done:
            return
        for text in self._first_steps.step():
            log.warning(text)

    def _save_or_stop(self, total: torch.Tensor) -> None:
        """Within an epoch: save where a checkpoint is due, save and raise KeyboardInterrupt where the run is asked to stop."""
        save, stop = self._ask()
        if not (save or stop):
            return
        self._check_finite(total, self.step)
        self._average_statistics()
        if self.world.is_rank0:
            self.save()
        if stop:
            self._end()

    def _end(self) -> NoReturn:
        self.world.all_gather(None)  # no worker ends before rank 0 has saved
        raise KeyboardInterrupt

    def _ask(self) -> tuple[bool, bool]:
        """Whether to save and whether to stop: the same answer for all workers, who exchange it about once a second."""
        minutes = self.config.train.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        if self.world.size == 1:
            return due, self.stop.asked()
        if self._until_asked > 0:
            self._until_asked -= 1
            return False, False
        now, (then, done) = time.monotonic(), self._asked
        self._asked = now, self._steps
        steps = int(_ASK_EVERY * (self._steps - done) / max(now - then, 1e-9))
        answers = self.world.all_gather((due, self.stop.asked(), min(steps, _ASK_STEPS)))
        due, _, self._until_asked = answers[0]
        return due, any(stop for _, stop, _ in answers)

    def _raise_if_stopped(self) -> None:
        """For evaluation, which changes nothing: it may end at any batch."""
        if self.stop.polled and self.stop.asked():
            raise KeyboardInterrupt

    def _average_statistics(self) -> None:
        networks = self.objective.networks
        self.world.average_statistics(networks if self.average is None else [*networks, self.average.network])

    @property
    def _checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def _schedule(self, epoch: float) -> None:
        """Set what follows a schedule, for a step at `epoch` (fractional)."""
        self.network.schedule(epoch, self.config.train.epochs)
        factor = lr_factor(self.config.schedule, epoch, self.config.train.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor * group["scale"]

    def _check_finite(self, total: torch.Tensor, step: int) -> None:
        if not torch.isfinite(total):
            raise UserError(
                f"the loss is not finite in epoch {self.epoch + 1}, by step {step}; lower optimizer.lr "
                f"(it is {self.config.optimizer.lr}), set optimizer.clip_norm, or train.precision: fp32; "
                f"checkpoints up to epoch {self.epoch} are kept"
            )

    def _write(self, run_log: RunLog | None, row: dict[str, Any]) -> None:
        """An epoch's row; before its checkpoint: a resumed run drops rows beyond that, and misses none."""
        row["seconds"] |= self.spent
        self.spent = dict.fromkeys(self.spent, 0.0)
        if run_log is not None:
            run_log.write(row)

    def _validate_last(self, run_log: RunLog | None) -> None:
        """Validate the last epoch where the run was stopped before that."""
        if self.step or "val" not in self.prepared.splits:
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
        if "val" not in self.prepared.splits:
            return
        scores = self.evaluate("val")
        if scores is None:
            return
        row["val"] = scores.numbers()
        # The class mean: a validation split carved out of unbalanced data must not favour the head.
        if self.keep_best and (self.best is None or scores.balanced > self.best["balanced"]):
            self.best = {"epoch": self.epoch, "balanced": scores.balanced}
            started = time.perf_counter()
            save_checkpoint(self._checkpoints / BEST, self._checkpoint(self.judged.state_dict()))
            self.spent["checkpoint"] += time.perf_counter() - started

    def _checkpoint(self, weights: _Tensors, rows: list[dict[str, Any]] | None = None, **more: _Tensors) -> Checkpoint:
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
            weights=weights,
            **more,
        )

    def _result(self) -> dict[str, Any]:
        """Both checkpoints on the held-out split. The test set is looked at here for the first time, and chooses nothing."""
        split = "test" if "test" in self.prepared.splits else "val"
        result: dict[str, Any] = {"split": split, "last": self._scored(split, self.epoch)}
        path = self._checkpoints / BEST
        epoch = None if self.best is None else self.best["epoch"]  # known to rank 0 alone
        same = epoch == self.epoch and self.step == 0  # the same weights; not where fewer epochs were set within the next one
        if same:
            result["best"] = result["last"]
        best = self.world.broadcast_from_rank0(lambda: _readable(path) if epoch is not None and not same else None)
        if best is not None and _loaded(self.judged, best):
            result["best"] = self._scored(split, best.epoch)
        return result if self.world.is_rank0 else {}


def _readable(path: Path) -> Checkpoint | None:
    """The best checkpoint, where it is whole: the last one's scores do not depend on it."""
    try:
        return load_checkpoint(path)
    except UserError as error:
        log.warning("%s; the result is the last epoch's alone", error)
        return None


def _loaded(network: HybridNetwork, best: Checkpoint) -> bool:
    """Load the best checkpoint's weights, where they are of this network: the file may be another run's."""
    try:
        load_weights(network, best)
    except UserError as error:
        log.warning("the best checkpoint: %s; the result is the last epoch's alone", error)
        return False
    return True


def _keeps_statistics(config: RunConfig) -> bool:
    """Whether batch norm keeps the running statistics that it starts with."""
    if config.train.batch_norm == "auto":
        return config.network.backbone.weights != "none"
    return config.train.batch_norm == "keep"


def _checkpoint_activations(backbone: nn.Module, title: str) -> None:
    """Let a backbone compute activations again in the backward pass. Raises UserError where it cannot."""
    switch = getattr(backbone, "set_grad_checkpointing", None)
    if switch is None:
        raise UserError(f"train.checkpoint_activations: network.backbone {title!r} cannot; timm's models can (kind: timm)")
    switch(True)


class _Watch:
    """A value on its way from the device, looked at when it has long arrived: training never waits for it."""

    def __init__(self, value: torch.Tensor, check: Callable[[torch.Tensor], None]) -> None:
        self._check = check
        self._value = torch.empty((), pin_memory=value.is_cuda).copy_(value, non_blocking=True)
        self._arrived = torch.cuda.Event() if value.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def look(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()
        self._check(self._value)


def _fitting_batch(config: RunConfig, prepared: Prepared) -> RunConfig:
    """`config` with a batch of all images where a head is trained on fewer than one batch has."""
    samples, batch = prepared.splits["train"].samples, config.train.batch_size
    if config.train.tune != "head" or batch <= samples:
        return config
    log.info("train.batch_size is lowered from %d to all %d training images", batch, samples)
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": samples})})


def _decide_cache(config: LoaderConfig, prepared: Prepared, world: World, device: str) -> LoaderConfig:
    """The cache for all workers: it decides the order of the images, so one whose memory is too small speaks for all."""
    cache = decide_cache(prepared, "train", config).cache
    small = float(world.sum(torch.tensor(float(cache == "process"), device=device)))
    return config.model_copy(update={"cache": "process" if small else "os"})


def _batches(config: RunConfig, workers: int) -> tuple[object, ...]:
    """What the batches of an epoch follow from."""
    loader, data = config.loader, config.data.model_dump(mode="json")
    data["source"].pop("expect", None)
    pages = loader.read_ahead_mb if loader.cache == "process" else None
    return config.train.batch_size, config.seed, data, pages, workers if loader.part == "shards" else None


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    terms = "  ".join(f"{name} {value:.3f}" for name, value in row["train"].items())
    val = f"  val balanced {100 * row['val']['balanced']:.1f} %" if "val" in row else ""
    return f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  {terms}{val}  {row['rate']['images_per_s']:,.0f} img/s"
