"""What `data:` and `loader:` in a configuration may say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.common.settings import Settings
from pipelines.pixels import MAX_PIXELS
from pipelines.prepare.sources import Source
from pipelines.prepare.sources.addresses import PublicAddress


class NoProfile(Settings):
    """Every training image."""

    kind: Literal["none"] = "none"


class ExpProfile(Settings):
    """n_i = int(n_max · μ^(i/(C-1))), μ = 1/imbalance, classes in index order, as in CIFAR-LT."""

    kind: Literal["exp"]
    imbalance: float = Field(ge=1, description="Largest over smallest class.")
    largest: int | None = Field(
        default=None, ge=1, lt=1 << 31, description="Images of the largest class; by default as the smallest has."
    )
    subset: Literal["seeded", "field"] = Field(
        default="seeded",
        description="Which images are kept. seeded: by data.subset_seed, so that a smaller imbalance contains a larger one; "
        "field: those of the published CIFAR-LT tables (np.random.seed(0) over the order of the sources cifar10 and cifar100).",
    )


class StepProfile(Settings):
    """The first half of the classes keeps n_max images, the second half n_max / imbalance."""

    kind: Literal["step"]
    imbalance: float = Field(ge=1, description="Largest over smallest class.")
    largest: int | None = Field(
        default=None, ge=1, lt=1 << 31, description="Images of the large classes; by default as the smallest has."
    )


class ListProfile(Settings):
    """The images that a split list names ("path label" a line), of a source that holds more."""

    kind: Literal["list"]
    path: Path = Field(description="The split list.")


class CountsProfile(Settings):
    """So many images of each class: a JSON list in label order, or a mapping of class name or index to count."""

    kind: Literal["counts"]
    path: Path = Field(description="The JSON file.")


Profile = Annotated[NoProfile | ExpProfile | StepProfile | ListProfile | CountsProfile, Field(discriminator="kind")]


class Store(Settings):
    """How images lie in the .beton file."""

    mode: Literal["auto", "raw", "jpeg", "mixed"] = Field(
        default="auto",
        description="auto: raw pixels up to 64x64, JPEG above; original JPEG bytes are kept where they fit; "
        "mixed: a share of the training images raw, which takes room and spares decoding",
    )
    raw_share: float = Field(default=0.5, ge=0, le=1, description="Share of the training images that mode 'mixed' stores raw.")
    shard_mb: int | None = Field(default=None, ge=1, description="Size of a file in MiB; null: one file for each split.")
    max_side: int | None = Field(
        default=500, ge=1, le=65535, description="Longer images are scaled down to this many pixels; null: no limit."
    )
    square: int | None = Field(
        default=None, ge=1, le=4096, description="Resize every image to this width and height, in pixels."
    )
    quality: int = Field(default=92, ge=1, le=100, description="JPEG quality of images that are encoded again.")


class RandomCrop(Settings):
    """A crop of the output size at a random place of the image padded with black: torchvision's RandomCrop."""

    kind: Literal["crop"]
    padding: int = Field(default=4, ge=0, description="Pixels of padding on each side.")


class RandomResizedCrop(Settings):
    """A crop of random area and aspect ratio, resized to the output size: torchvision's RandomResizedCrop."""

    kind: Literal["resized"]
    scale: tuple[float, float] = Field(default=(0.08, 1.0), description="Smallest and largest share of the image's area.")
    ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="Smallest and largest width over height.")

    @model_validator(mode="after")
    def _ordered(self) -> RandomResizedCrop:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two numbers, 0 < low <= high")
        if self.scale[1] > 1:
            raise ValueError("scale is a share of the image's area: at most 1")
        return self


class CenterCrop(Settings):
    """The central square, `ratio` of the shorter side, resized to the output size (224 of 256: ratio .875)."""

    kind: Literal["center"]
    ratio: float = Field(default=1.0, gt=0, le=1, description="Share of the shorter side.")


Cut = Annotated[RandomCrop | RandomResizedCrop | CenterCrop, Field(discriminator="kind")]


class AutoAugment(Settings):
    """One of the policy's 25 pairs of operations, each with its own probability and strength."""

    kind: Literal["auto_augment"]
    policy: Literal["cifar10"] = Field(default="cifar10", description="The learned policy.")
    style: Literal["torchvision", "authors"] = Field(
        default="torchvision",
        description="torchvision: torchvision's AutoAugment; authors: as the published long-tail code has it: grey 128 outside "
        "a moved image, bicubic shears, rotations one way.",
    )


class RandAugment(Settings):
    """`count` operations for each sample, all of about the same strength."""

    kind: Literal["rand_augment"]
    count: int = Field(default=2, ge=1, le=8, description="Operations for each sample.")
    magnitude: int = Field(
        default=10, ge=0, le=30, description="Strength of the operations: 0 to 30 of torchvision's, 0 to 10 of timm's."
    )
    style: Literal["torchvision", "timm"] = Field(
        default="torchvision",
        description="torchvision: 14 operations, torchvision's RandAugment; timm: 15 operations, timm's rand-nN-mM-mstdS, with "
        "the mean colour outside a moved image.",
    )
    noise: float = Field(default=0.0, ge=0, le=10, description="Standard deviation of each strength (timm's mstd).")
    probability: float = Field(default=1.0, ge=0, le=1, description="Chance of each operation (timm's is .5).")

    @model_validator(mode="after")
    def _of_style(self) -> RandAugment:
        if self.style == "timm" and self.magnitude > 10:
            raise ValueError(f"magnitude {self.magnitude} is on torchvision's scale of 0 to 30; timm's is 0 to 10")
        if self.style == "torchvision" and self.noise:
            raise ValueError("noise is timm's: set style: timm, or leave it out")
        return self


class Cutout(Settings):
    """A black square about a pixel drawn anywhere in the image, clipped by its border: DeVries & Taylor, arXiv:1708.04552."""

    kind: Literal["cutout"]
    size: int = Field(default=16, ge=1, le=2048, description="Width and height of the square, in pixels.")


class ColorJitter(Settings):
    """Brightness, contrast, saturation and hue, in an order drawn for each sample: torchvision's ColorJitter.

    A factor is drawn from max(0, 1 - x) to 1 + x, the turn of the hue from -x to x, in turns of the colour circle.
    """

    kind: Literal["color_jitter"]
    brightness: float = Field(default=0.4, ge=0, le=10, description="x of the brightness factor.")
    contrast: float = Field(default=0.4, ge=0, le=10, description="x of the contrast factor.")
    saturation: float = Field(default=0.4, ge=0, le=10, description="x of the saturation factor.")
    hue: float = Field(default=0.1, ge=0, le=0.5, description="x of the turn of the hue.")
    probability: float = Field(default=0.8, ge=0, le=1, description="Share of the samples that change.")


class Grayscale(Settings):
    """Luma in all three channels: torchvision's RandomGrayscale."""

    kind: Literal["grayscale"]
    probability: float = Field(default=0.2, ge=0, le=1, description="Share of the samples that change.")


class Blur(Settings):
    """A Gaussian of a width drawn for each sample: torchvision's GaussianBlur."""

    kind: Literal["blur"]
    sigma: tuple[float, float] = Field(default=(0.1, 2.0), description="Smallest and largest standard deviation, in pixels.")
    probability: float = Field(default=0.5, ge=0, le=1, description="Share of the samples that change.")
    kernel: int | None = Field(
        default=None,
        ge=3,
        le=255,
        description="Width of the kernel, an odd number; null: wide enough for the largest sigma (four of it to each side).",
    )

    @model_validator(mode="after")
    def _usable(self) -> Blur:
        if not 0.01 <= self.sigma[0] <= self.sigma[1] <= 100:
            raise ValueError("sigma must be two numbers, 0.01 <= low <= high <= 100")
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError("kernel must be an odd number: it has a middle")
        return self


Augmentation = Annotated[
    AutoAugment | RandAugment | Cutout | ColorJitter | Grayscale | Blur,
    Field(discriminator="kind"),
]


class View(Settings):
    """How one view of an image is cut, and what is done to its pixels then. Every sample of every view has its own draw."""

    cut: Cut = RandomCrop(kind="crop")
    flip: float = Field(default=0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    augment: tuple[Augmentation, ...] = Field(
        default=(), max_length=8, description="Augmentations, in this order, after cut and flip."
    )


Sampling = Literal["instance", "square_root", "class_balanced", "weighted"]


class DataConfig(Settings):
    """Images, their long tail, and what the network sees of them."""

    source: Source = Field(description="Where the images are, for example data: {source: {kind: folder, path: FOLDER}}.")
    profile: Profile = NoProfile()
    val_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of each class's training images set aside for validation, before the profile, where the source has "
        "no validation images of its own.",
    )
    test_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of each class's images set aside as the test split, where the source has none of its own.",
    )
    split_by: str | None = Field(
        default=None,
        description="Images of one patient, camera or site stay in one split. group: as the source's group column says; else a "
        "regular expression with one group, found in each image's name, such as '(patient\\d+)'. null: each image by itself.",
    )
    exclude: Path | None = Field(
        default=None,
        description="A file of images to leave out, as pipelines.doctor writes it. A line is the source's split (train, val or "
        "test), a tab and the image's name as in SPLIT.files.txt; or the name alone, where no other split has it.",
    )
    subset_seed: int | None = Field(default=None, ge=0, description="Seed of the profile's draw; null: the run's seed.")
    on_bad_image: Literal["error", "skip"] = Field(
        default="error", description="skip: unreadable images are left out, counted, and listed with their reasons"
    )
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="largest image that is read, in pixels; a larger one is bad")
    window: tuple[float, float] | None = Field(
        default=None,
        description="values of black and white in all grey images of more than 8 bits, as they are in the file; needed where "
        "it does not tell their depth: [0, 4095] for 12 bits",
    )
    store: Store = Store()
    prepared: Path = Field(default=Path("prepared"), description="Folder of the .beton files.")
    published: PublicAddress | None = Field(
        default=None,
        description="Address of prepared folders in object storage, such as s3://bucket/prepared. pipelines.prepare copies the "
        "prepared folder there; other commands fetch the files that they read. null: prepared on this machine.",
    )
    cache_gb: float = Field(
        default=100,
        gt=0,
        description="GB of fetched files that are kept below data.prepared. The files that were used longest ago are removed "
        "first, never one in use.",
    )
    size: int = Field(default=32, ge=4, le=2048, description="Width and height of the network's input, in pixels.")
    views: tuple[View, ...] = Field(
        default=(View(), View()), min_length=1, max_length=8, description="The views of each training image."
    )
    sampling: Sampling = Field(
        default="instance",
        description="How often an epoch shows a class: by its number of images, by its square root, or every class alike. "
        "weighted: each image by its weight, a column of the table (data.source.weight).",
    )
    eval_cut: Cut = CenterCrop(kind="center")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="How evaluation resizes, with antialiasing."
    )
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="Subtracted from red, green and blue, which are 0 to 1."
    )
    std: tuple[float, float, float] = Field(default=(0.229, 0.224, 0.225), description="Divides red, green and blue then.")

    @model_validator(mode="after")
    def _usable(self) -> DataConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction:g} and test_fraction {self.test_fraction:g} leave no image to train on; "
                "their sum must be less than 1"
            )
        if self.split_by not in (None, "group"):
            try:
                groups = re.compile(str(self.split_by)).groups
            except re.error as error:
                raise ValueError(f"split_by is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError("split_by must be 'group', or a regular expression with one pair of (parentheses)")
        if not isinstance(self.eval_cut, CenterCrop):
            raise ValueError("eval_cut must be of kind 'center': evaluation draws nothing at random")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError("window must be two values, black < white")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        for number, view in enumerate(self.views):
            for part in view.augment:
                # A blurred border is the image reflected about it. A kernel of the default width always fits.
                if isinstance(part, Blur) and part.kernel is not None and part.kernel // 2 >= self.size:
                    raise ValueError(
                        f"views.{number} has a blur kernel of {part.kernel}, too wide for images of {self.size}x{self.size}; "
                        f"set it to {2 * self.size - 1} at most"
                    )
        return self


class LoaderConfig(Settings):
    """Which loader feeds the network, and with how many threads."""

    kind: Literal["auto", "resident", "ffcv", "torch"] = Field(
        default="auto",
        description="resident: all images in the memory of the device that trains; ffcv, torch: from files; auto: the fastest",
    )
    cache: Literal["auto", "os", "process"] = Field(
        default="auto",
        description="os: files mapped into memory, any image at any time, for data that fit into memory; process: pages are "
        "read ahead in large pieces (by FFCV's loader), in an order random within `read_ahead_mb`; auto: by the size of memory",
    )
    read_ahead_mb: int = Field(
        default=1024, ge=16, description="MiB that a worker with cache 'process' reads ahead; it holds twice as much."
    )
    part: Literal["all", "shards"] = Field(
        default="all",
        description="all: each worker reads any image; shards: worker r of R only the files r, r + R, ..., so that a node "
        "needs no others (data.store.shard_mb)",
    )
    workers: int | None = Field(default=None, ge=1, le=512, description="Threads (ffcv) or processes (torch); null: what fits.")
    batches_ahead: int = Field(default=3, ge=1, le=32, description="Batches that are read before they are needed.")
