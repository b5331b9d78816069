"""One run's configuration, composed of each part's own."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from cibl_ray.losses.cibl import CIBLConfig
from cibl_ray.losses.config import LossConfig
from cibl_ray.networks.backbones.config import weights_file
from cibl_ray.networks.config import LastBlocks, NetworkConfig, PartialConfig
from cibl_ray.recipes import add_recipe
from pipelines.common.config_file import find_config, read_content
from pipelines.common.errors import UserError
from pipelines.common.files import write_atomically
from pipelines.common.settings import Settings, absolute, override, parse_overrides
from pipelines.common.validation import validate
from pipelines.config import CenterCrop, DataConfig, LoaderConfig

log = logging.getLogger(__name__)


class SAMConfig(Settings):
    """Sharpness-aware minimisation (Foret et al. 2021). Each step costs as much as two."""

    rho: float = Field(default=0.05, gt=0, le=10, description="ρ, radius of the neighbourhood whose highest loss is minimised.")
    start: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the run at which it begins; `from` is another name of this field."
    )

    @model_validator(mode="before")
    @classmethod
    def _from(cls, value: Any) -> Any:
        """`from` is `start`: Python has no field of that name."""
        if isinstance(value, dict) and {"from", "start"} <= value.keys():
            raise ValueError("from and start are two names of one field; leave one of them out")
        return {("start" if key == "from" else key): each for key, each in value.items()} if isinstance(value, dict) else value


class OptimizerConfig(Settings):
    """SGD with momentum, Nesterov's or plain, or AdamW (Loshchilov and Hutter 2019)."""

    kind: Literal["sgd", "adamw"] = Field(default="sgd", description="sgd: for training from scratch; adamw: for fine-tuning.")
    lr: float = Field(default=0.1, gt=0, description="Learning rate for the whole batch; the schedule scales it.")
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Each block of the backbone has the learning rate of the next one times this; 1: the same for all.",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="The two decay rates of AdamW.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(
        default=True, description="Use Nesterov momentum, with SGD. Most published long-tail recipes use plain momentum: false."
    )
    weight_decay: float = Field(
        default=5e-4, ge=0, description="L2 penalty of SGD on all weights; AdamW's is decoupled and spares norms and biases."
    )
    clip_norm: float | None = Field(default=None, gt=0, description="Gradients are clipped to this norm; null: no clipping.")
    sam: SAMConfig | None = Field(default=None, description="Sharpness-aware minimisation; null: none.")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerConfig:
        if self.kind == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0; set optimizer.nesterov: false")
        return self


class _WarmUp(Settings):
    warmup_epochs: float = Field(default=5, ge=0, description="Epochs in which the rate rises linearly from 0.")
    warmup_by: Literal["step", "epoch"] = Field(
        default="step",
        description="step: the rate rises in every step; epoch: it is (e+1)/warmup_epochs of the rate throughout epoch e, as "
        "in the field's code.",
    )


class StepSchedule(_WarmUp):
    """Linear warm-up, then the rate times `gamma` at each milestone (a share of the epochs)."""

    kind: Literal["steps"]
    milestones: tuple[float, ...] = Field(
        default=(0.8, 0.9), description="Fractions of the run at which the rate is multiplied by gamma."
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="Factor of the rate at each milestone.")

    @model_validator(mode="after")
    def _shares(self) -> StepSchedule:
        if any(not 0 < milestone < 1 for milestone in self.milestones):
            raise ValueError("milestones are shares of the epochs, between 0 and 1")
        return self


class CosineSchedule(_WarmUp):
    """Linear warm-up, then half a cosine down to `final` times the rate."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1, description="Rate at the end, as a fraction of the rate after warm-up.")


ScheduleConfig = Annotated[StepSchedule | CosineSchedule, Field(discriminator="kind")]


class CMOConfig(Settings):
    """CMO (Park et al. 2022): CutMix that pastes images of rare classes into images of common ones."""

    chance: float = Field(default=0.5, ge=0, le=1, description="Share of the steps whose images are mixed.")
    first_epochs: int = Field(default=4, ge=0, description="Epochs at the start without it.")
    last_epochs: int = Field(default=3, ge=0, description="Epochs at the end without it.")


class TrainConfig(Settings):
    """Length, batch, arithmetic and checkpoints of the training, and what of the backbone is trained."""

    start: Path | None = Field(
        default=None,
        description="A finished run's folder, or a checkpoint: its weights are the first ones, for second stages; null: none.",
    )
    tune: Literal["head", "classifier", "partial", "full"] = Field(
        default="full",
        description="head: the backbone is frozen, and its features are computed once; classifier: the head alone is trained, "
        "on augmented images, while batch norm estimates its statistics again; partial: a part of the backbone is trained, "
        "too; full: all of it.",
    )
    partial: PartialConfig = Field(
        default=LastBlocks(), discriminator="kind", description="Which part of the backbone tune 'partial' trains."
    )
    batch_norm: Literal["auto", "keep", "update", "sync"] = Field(
        default="auto",
        description="Which statistics batch norm takes in the layers that are trained. keep: the running ones that the weights "
        "came with, in training, too. Small batches of few classes have other statistics. update: those of each batch, or of a "
        "worker's part of it. sync: those of the whole batch of all workers. auto: keep where the backbone starts from "
        "pretrained weights, else update.",
    )
    feature_views: int = Field(
        default=0, ge=0, le=64, description="Augmented views of each training image that tune 'head' computes features of."
    )
    folds: Annotated[int, Field(ge=0, le=20)] | Literal["auto"] = Field(
        default=0,
        description="Cross-validate a head (tune 'head'): so many heads, each scored on its own part of the training images. "
        "They choose the tail shift, and the last epoch is kept. auto: 5 where a class has one or two validation images.",
    )
    head_start: Literal["auto", "random", "class_means", "trained", "tau_normalized"] = Field(
        default="auto",
        description="Weights of the head before the first step. auto: those of train.start, where one is named, else random; "
        "class_means: from the mean feature of each class; trained: trained on the features of the pretrained backbone first, "
        "in seconds (for tune 'partial' and 'full'); tau_normalized: those of train.start, τ-normalised.",
    )
    tau: Annotated[float, Field(ge=0, le=4)] | Literal["auto"] = Field(
        default="auto",
        description="τ of head_start 'tau_normalized': 0 leaves the norms of the classes' weights, 1 makes them equal. auto: "
        "the one that is best on validation.",
    )
    epochs: int = Field(
        default=200, ge=0, description="Passes through the training split. 0: the weights of train.start stay as they are."
    )
    batch_size: int = Field(
        default=128, ge=2, description="Images in a step, over all workers; each gives as many views as data.views has."
    )
    views_from: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the epochs from which a step has every view; before it the first alone, which costs less. "
        "0: always every view.",
    )
    mixup: float = Field(
        default=0.0, ge=0, le=100, description="α of mixup: images and labels are mixed, λ ~ Beta(α, α). 0: none."
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="α of CutMix: a rectangle of another image, labels by area. 0: none; with mixup, each half the steps.",
    )
    cmo: CMOConfig | None = Field(
        default=None, description="CMO: rectangles of images drawn class-balanced, labels by area; null: none."
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Micro-batches of a step, one after the other: less memory. Batch norm sees a micro-batch alone; "
        "contrast_set says what contrastive losses see.",
    )
    contrast_set: Literal["micro_batch", "step"] = Field(
        default="micro_batch",
        description="Images that a loss compares with each other where accumulate is more than 1. micro_batch: those of the "
        "micro-batch; step: those of all micro-batches, as in one large batch (GradCache), for a third more time.",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="Compute activations again in the backward pass instead of keeping them: less memory, a third more time. "
        "For timm's models that can; batch norm's running statistics move twice a step.",
    )
    eval_batch_size: int = Field(default=500, ge=1, description="Images in a batch of evaluation.")
    evaluate_every: int = Field(
        default=1,
        ge=1,
        description="Epochs between evaluations on the validation split; the last epoch has one in any case. "
        "The best epoch is chosen among those that are evaluated.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="auto: bf16 mixed precision where the GPU or CPU has it, else fp32 (on GPUs with TF32 in convolutions); "
        "a run of ten minutes or more times a few steps of both.",
    )
    exchange_precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="Type in which workers exchange gradients. bf16 and fp16 halve the traffic and round every gradient; fp16 "
        "rounds less, and loses those below 6e-8.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where there is one.")
    average: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of an exponential average of the weights, for example 0.999. The average is then evaluated and "
        "exported; null: the weights themselves.",
    )
    compile: bool | Literal["auto"] = Field(
        default=False,
        description="Compile the networks with torch.compile, on a GPU as CUDA graphs. Takes half a minute and a C++ compiler. "
        "auto: where a few steps of the run's own network, timed as it starts, are faster so; not for runs below 30 minutes.",
    )
    checkpoint_every: int = Field(default=1, ge=1, description="Epochs between checkpoints.")
    checkpoint_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Most minutes between checkpoints within an epoch; null: checkpoints at the ends of epochs only.",
    )

    @model_validator(mode="after")
    def _random_without_a_start(self) -> TrainConfig:
        """Without a run to start from 'random' is what 'auto' means; earlier versions wrote it, and such runs are the same."""
        if self.start is None and self.head_start == "random":
            self.__dict__["head_start"] = "auto"
        return self


TrackerName = Literal["tensorboard", "mlflow", "wandb", "csv"]


class RunConfig(Settings):
    """Everything that decides a run, and where its numbers go."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Decides order, subset, augmentation and weights.")
    runs: Path = Field(default=Path("runs"), description="Folder in which the run folders are made.")
    data: DataConfig
    loader: LoaderConfig = LoaderConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = CIBLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = CosineSchedule()
    train: TrainConfig = TrainConfig()
    track: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description="Trackers that get the numbers of each epoch. mlflow and wandb need the extra `track`; their server and "
        "key come from the environment.",
    )

    def with_train(self, **fields: Any) -> RunConfig:
        """This configuration with other values of fields of `train`, which are not validated."""
        return self.model_copy(update={"train": self.train.model_copy(update=fields)})

    @field_validator("track", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        needs = self.loss.needs
        mixes = self.train.mixup or self.train.cutmix or self.train.cmo is not None
        if mixes and (needs.projection or needs.second_stream is not None):
            raise ValueError(
                f"train.mixup, cutmix and cmo mix labels, and the contrastive loss {self.loss.kind!r} needs whole ones; "
                "set them to 0, or use a loss of classification"
            )
        if (self.train.cutmix or self.train.cmo is not None) and self.train.tune == "head":
            raise ValueError("train.cutmix and train.cmo cut images, and train.tune 'head' has features; use train.mixup")
        if self.train.cmo is not None and (self.train.mixup or self.train.cutmix):
            raise ValueError("train.cmo does not go with train.mixup and train.cutmix; set them to 0, or leave cmo out")
        if self.train.compile is True and self.train.accumulate > 1:
            raise ValueError("train.accumulate > 1 does not go with train.compile; set one of them back")
        if self.train.compile is True and self.train.batch_norm == "sync":
            raise ValueError("train.batch_norm 'sync' does not go with train.compile; set one of them back")
        if self.train.folds == 1:
            raise ValueError("train.folds is 1, and one fold leaves nothing to train on; set 0 for none, or 2 and more")
        if self.train.tune != "head" and self.train.folds not in (0, "auto"):
            raise ValueError(f"train.folds {self.train.folds} is for train.tune 'head'; leave it out with {self.train.tune!r}")
        if self.train.tune == "head" and self.train.head_start == "trained":
            raise ValueError("train.head_start 'trained' is for train.tune 'partial' and 'full'; leave it out")
        self._check_second_stage()
        if needs.class_means and self.network.projection.size < 16:
            raise ValueError(
                f"network.projection.size is {self.network.projection.size}; loss {self.loss.kind!r} needs 16 or more"
            )
        self.network.check(self.data.size, "size" in self.data.model_fields_set, self.train.epochs)
        self.loss.check(self.network.head, len(self.data.views))
        if self.train.views_from > 0:
            self._check_one_view()
        return self

    def _check_one_view(self) -> None:
        if self.train.tune == "head":
            raise ValueError("train.views_from is for images, and train.tune 'head' has features; leave it out")
        try:
            self.loss.check(self.network.head, 1)
        except ValueError as error:
            raise ValueError(
                f"train.views_from = {self.train.views_from:g} begins with one view, and loss {self.loss.kind!r} as configured "
                "needs more; set it to 0"
            ) from error

    def _check_second_stage(self) -> None:
        train, needs = self.train, self.loss.needs
        if train.epochs == 0 and train.start is None:
            raise ValueError("train.epochs is 0, so nothing is trained; that is for train.start, which names a finished run")
        if train.head_start == "tau_normalized" and train.start is None:
            raise ValueError("train.head_start 'tau_normalized' needs a trained head: name a finished run by train.start")
        if train.head_start == "tau_normalized" and self.network.head.cosine:
            raise ValueError(
                "train.head_start 'tau_normalized' divides by the norms of a linear head; those of a cosine head play no part"
            )
        if train.tune != "classifier":
            return
        if train.start is None and not self.network.backbone.pretrained:
            raise ValueError("train.tune 'classifier' leaves the backbone as it is: name a finished run by train.start")
        if needs.projection or needs.second_stream is not None:
            raise ValueError(
                f"train.tune 'classifier' trains the head alone, and loss {self.loss.kind!r} contrasts; use a loss of "
                "classification: --loss.kind label_smoothing"
            )


def warmup_of(schedule: StepSchedule | CosineSchedule, epochs: int) -> float:
    """The warm-up of a run of `epochs` epochs: as configured, or a quarter of a run that is shorter than that."""
    return schedule.warmup_epochs if schedule.warmup_epochs <= epochs else epochs / 4


def one_view_epochs(train: TrainConfig) -> int:
    """Epochs at the start of a run that have the first view alone (`train.views_from`)."""
    return math.ceil(round(train.views_from * train.epochs, 6))


def load_config(name: str, arguments: list[str]) -> RunConfig:
    """Load a configuration.

    Args:
        name: A YAML file, or the name of a shipped configuration.
        arguments: `--field value` of the command line.

    Raises:
        UserError: There is no such configuration, or a value is invalid.
    """
    path = find_config(name)
    return build_config(read_content(path, RunConfig), arguments, str(path))


def build_config(content: dict[str, Any], arguments: list[str], place: str) -> RunConfig:
    """Build a configuration from a file's content and the command line.

    Args:
        content: The content.
        arguments: `--field value` of the command line.
        place: Where the content comes from, for errors.

    Returns:
        The configuration, with absolute paths.

    Raises:
        UserError: A field is unknown, or has a value that it cannot have.
    """
    pairs = parse_overrides(arguments, RunConfig)
    return configured(content, pairs, place, [key for key, _ in pairs])


def configured(content: dict[str, Any], pairs: list[tuple[str, Any]], place: str, flags: Sequence[str] = ()) -> RunConfig:
    """Build a configuration from a file's content.

    Args:
        content: The content.
        pairs: Values by dotted name, which replace those of the content.
        place: Where the content comes from, for errors.
        flags: Names that were given on the command line, for errors.

    Returns:
        The configuration, with absolute paths and the input that its pretrained weights take.

    Raises:
        UserError: A field is unknown, or has a value that it cannot have.
    """
    recipe = add_recipe(content, pairs, RunConfig)
    config = validate(RunConfig, override(recipe, pairs, RunConfig), place, flags)
    if pairs:
        _say_rate(recipe, config)
    return absolute(_as_pretrained(config, place))


def with_recipe(content: dict[str, Any], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A configuration file's content with values by dotted name, and with the recipe that `train.tune` among them asks for."""
    return override(add_recipe(content, pairs, RunConfig), pairs, RunConfig)


def _say_rate(content: dict[str, Any], config: RunConfig) -> None:
    """Warn where the batch size is another one than the recipe's, and the learning rate is the recipe's."""
    train, optimizer = (content[part] if isinstance(content.get(part), dict) else {} for part in ("train", "optimizer"))
    batch = train.get("batch_size", TrainConfig().batch_size)
    rate = optimizer.get("lr", OptimizerConfig().lr)
    size = config.train.batch_size
    if not isinstance(batch, int) or size == batch or config.optimizer.lr != rate:
        return
    power, rule = (1.0, "linear") if config.optimizer.kind == "sgd" else (0.5, "square-root")
    log.warning(
        "train.batch_size is %d instead of %d, and optimizer.lr is still %g; by the %s rule: --lr %.2g",
        size, batch, rate, rule, rate * (size / batch) ** power,
    )  # fmt: skip


def _as_pretrained(config: RunConfig, place: str) -> RunConfig:
    """`config` with the input that the backbone's weights were trained for, where the configuration does not set it."""
    backbone = config.network.backbone
    if (file := weights_file(backbone)) is not None:
        network = config.network.model_copy(update={"backbone": backbone.model_copy(update={"weights": str(file)})})
        config = config.model_copy(update={"network": network})
    rule = backbone.input_rule()
    if rule is None:
        return config
    wanted = {
        "size": rule.size,
        "mean": rule.mean,
        "std": rule.std,
        "interpolation": rule.interpolation,
        "eval_cut": CenterCrop(kind="center", ratio=rule.ratio),
    }
    said = config.data.model_fields_set
    data = config.data.model_copy(update={name: value for name, value in wanted.items() if name not in said})
    if rule.fixed and data.size != rule.size:
        raise UserError(
            f"{place}: network.backbone {backbone.title!r} takes images of {rule.size} pixels only, data.size is {data.size}; "
            "leave data.size out"
        )
    return validate(RunConfig, config.model_copy(update={"data": data}).model_dump(mode="json"), place)


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as YAML. Atomically: an empty file would be a valid configuration, of defaults alone."""
    write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
