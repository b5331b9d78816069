"""The training loop. Knows neither Ray nor which loader or loss runs."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cibl_ray.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    load_checkpoint,
    load_momentum,
    load_weights,
    momentum_of,
    save_checkpoint,
)
from cibl_ray.config import RunConfig
from cibl_ray.evaluation import predict
from cibl_ray.hardware import cpu_has_bf16
from cibl_ray.losses.config import needs
from cibl_ray.losses.objective import Images, Objective, readings
from cibl_ray.metrics import Scores, score
from cibl_ray.networks.network import Outputs, build_network
from cibl_ray.runlog import RunLog
from cibl_ray.schedules import lr_factor
from pipelines.augment import Augment, Normalize
from pipelines.batch import Batch, Loader, eval_reading, make_loader
from pipelines.errors import UserError
from pipelines.prepare import Prepared
from pipelines.seeding import torch_seed

log = logging.getLogger(__name__)

_CHECK_EVERY = 50  # steps between looks at whether the loss is finite: each look waits for the device


class Trainer:
    """One run: data, network, optimizer, and where they stand.

    `config` must be resolved (`resolve`): no 'auto' in it. `epoch` counts the whole epochs done.
    """

    def __init__(self, config: RunConfig, prepared: Prepared, folder: Path) -> None:
        self.config, self.prepared, self.folder = config, prepared, folder
        self.device = torch.device(config.train.device)
        self.autocast = config.train.precision == "bf16"
        self.network = build_network(config.network, len(prepared.classes), needs(config.loss), config.seed)
        self.network.to(self.device)
        self.normalize = Normalize(config.data).to(self.device)
        self.objective = Objective(config.loss, self.network, prepared.train_counts, self.device)
        decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.network.named_parameters():
            decayed[self.network.decays(name)].append(parameter)
        self.optimizer = torch.optim.SGD(
            [
                {"params": decayed[True], "weight_decay": config.optimizer.weight_decay},
                {"params": decayed[False], "weight_decay": 0.0},
            ],
            lr=config.optimizer.lr,
            momentum=config.optimizer.momentum,
            nesterov=config.optimizer.nesterov,
        )
        self.epoch = 0
        self.best: dict[str, float] | None = None
        streams = readings(config.loss, config.data, config.train.batch_size, config.seed)
        self.augments = [Augment(reading.views, reading.size, reading.seed) for reading in streams]
        self.train_loaders = [make_loader(prepared, "train", reading, config.loader) for reading in streams]
        # Opened now, so that a damaged test set is not found out after the last epoch.
        held_out = eval_reading(config.data, config.train.eval_batch_size)
        self.eval_loaders: dict[str, Loader] = {
            split: make_loader(prepared, split, held_out, config.loader) for split in prepared.splits if split != "train"
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises UserError where it is of another network or other data."""
        if checkpoint.data != self._data_digests():
            raise UserError("the data have changed since this run began; start a new run")
        load_weights(self.network, checkpoint)
        load_momentum(self.network, self.optimizer, checkpoint.momentum)
        self.objective.load(checkpoint.objective)
        self.epoch, self.best = checkpoint.epoch, checkpoint.best

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch; returns the result: the last epoch and the best on validation, scored on the test set."""
        epochs, batches = self.config.train.epochs, self.train_loaders[0].batches
        images = batches * self.config.train.batch_size
        run_log = RunLog(self.folder, self.epoch)
        bar = tqdm(total=epochs * images, initial=self.epoch * images, unit="img", unit_scale=True, disable=None, mininterval=1)
        try:
            while self.epoch < epochs:
                row = self.train_epoch(bar)
                if "val" in self.prepared.splits:
                    self._validate(row)
                run_log.write(row)  # before the checkpoint: a resumed run drops rows beyond it, and misses none
                if self.epoch % self.config.train.checkpoint_every == 0 or self.epoch == epochs:
                    self.save()
                tqdm.write(_epoch_line(row, epochs))
        finally:
            bar.close()
            run_log.close()
            for loader in self.train_loaders:
                loader.close()
        try:
            return self._result()
        finally:
            for loader in self.eval_loaders.values():
                loader.close()

    def train_epoch(self, bar: tqdm | None = None) -> dict[str, Any]:
        """One epoch; returns its row for the log: mean terms, learning rate, images a second, and where the time went."""
        number, batches = self.epoch, self.train_loaders[0].batches
        torch.manual_seed(torch_seed(self.config.seed, "epoch", number))
        self.network.train()
        totals: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        started = time.perf_counter()
        waited = 0.0
        before = started
        streams = zip(*(loader.epoch(number) for loader in self.train_loaders), strict=True)
        for step, batch in enumerate(streams):
            waited += time.perf_counter() - before
            self._schedule(number + step / batches)
            terms = self.train_step(batch, step)
            for name, value in terms.items():
                totals[name] += value
            if step % _CHECK_EVERY == _CHECK_EVERY - 1 or step == batches - 1:
                self._check_finite(totals["loss"], step)
            if bar is not None:
                bar.update(len(batch[0].labels))
            before = time.perf_counter()
        self.epoch += 1
        seconds = time.perf_counter() - started
        images = batches * self.config.train.batch_size
        return {
            "epoch": self.epoch,
            "train": {name: float(total) / batches for name, total in totals.items()},
            "rate": {"lr": self.optimizer.param_groups[0]["lr"], "images_per_s": images / seconds},
            "seconds": {"epoch": seconds, "data_wait": waited},
        }

    def train_step(self, batches: Sequence[Batch], step: int) -> dict[str, torch.Tensor]:
        """One step of the optimizer on a batch of each stream, number `step` of the epoch; returns detached scalars by name."""
        return self.optimize([self._images(*pair, step) for pair in zip(batches, self.augments, strict=True)])

    def optimize(self, streams: list[Images]) -> dict[str, torch.Tensor]:
        """The same on images that are ready for the network."""
        terms = self.objective(self.network, self._run, streams, self.epoch / self.config.train.epochs)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        if self.config.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def _images(self, batch: Batch, augment: Augment, step: int) -> Images:
        pixels = self.normalize(augment(batch.views.to(self.device, non_blocking=True), self.epoch, step))
        return Images(pixels, batch.labels.to(self.device, non_blocking=True), batch.views.shape[1])

    def _run(self, network: nn.Module, pixels: torch.Tensor) -> Outputs:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            outputs: Outputs = network(pixels)
        return outputs

    def evaluate(self, split: str) -> Scores:
        """Scores of the network as it is on 'val' or 'test'."""
        logits, labels = predict(self.network, self.eval_loaders[split], self.normalize, self.device)
        return score(logits, labels, self.prepared.train_counts)

    def save(self) -> None:
        """Write the checkpoint to go on from."""
        whole = self._checkpoint(momentum_of(self.network, self.optimizer), self.objective.state())
        save_checkpoint(self._checkpoints / LAST, whole, keep_previous=True)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _schedule(self, epoch: float) -> None:
        """Set what follows a schedule, for a step at `epoch` (fractional)."""
        self.network.schedule(epoch, self.config.train.epochs)
        factor = lr_factor(self.config.schedule, epoch, self.config.train.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor

    def _check_finite(self, total: torch.Tensor, step: int) -> None:
        if not torch.isfinite(total):
            raise UserError(
                f"the loss is not finite in epoch {self.epoch + 1}, by step {step + 1}; lower optimizer.lr "
                f"(it is {self.config.optimizer.lr}), set optimizer.clip_norm, or train.precision: fp32; "
                f"checkpoints up to epoch {self.epoch} are kept"
            )

    def _validate(self, row: dict[str, Any]) -> None:
        scores = self.evaluate("val")
        row["val"] = scores.numbers()
        # The class mean: a validation split carved out of unbalanced data must not favour the head.
        if self.best is None or scores.balanced > self.best["balanced"]:
            self.best = {"epoch": self.epoch, "balanced": scores.balanced}
            save_checkpoint(self._checkpoints / BEST, self._checkpoint({}, {}))

    def _checkpoint(self, momentum: dict[str, torch.Tensor], objective: dict[str, torch.Tensor]) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            classes=self.prepared.classes,
            train_counts=self.prepared.train_counts,
            data=self._data_digests(),
            epoch=self.epoch,
            best=self.best,
            weights=self.network.state_dict(),
            momentum=momentum,
            objective=objective,
        )

    def _data_digests(self) -> dict[str, str]:
        return {name: split.source_digest for name, split in self.prepared.splits.items()}

    def _result(self) -> dict[str, Any]:
        """Both checkpoints on the held-out split. The test set is looked at here for the first time, and chooses nothing."""
        split = "test" if "test" in self.prepared.splits else "val"
        result: dict[str, Any] = {"split": split, "last": {"epoch": self.epoch, "scores": self.evaluate(split)}}
        if self.best is not None:
            best = load_checkpoint(self._checkpoints / BEST)
            load_weights(self.network, best)
            result["best"] = {"epoch": best.epoch, "scores": self.evaluate(split)}
        return result


def resolve(config: RunConfig) -> RunConfig:
    """`config` with every 'auto' decided for this machine. Raises UserError for a GPU that is not there."""
    device = config.train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda', but no CUDA device is visible; set it to 'cpu' or 'auto'")
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" or cpu_has_bf16() else "fp32"
    return config.model_copy(update={"train": config.train.model_copy(update={"device": device, "precision": precision})})


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    terms = "  ".join(f"{name} {value:.3f}" for name, value in row["train"].items())
    val = f"  val balanced {100 * row['val']['balanced']:.1f} %" if "val" in row else ""
    return f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  {terms}{val}  {row['rate']['images_per_s']:,.0f} img/s"
