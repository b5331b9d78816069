"""The same batches by PyTorch and torchvision, where FFCV cannot be built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.common.cores import usable_cores
from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders.cuts import HEIGHT, WIDTH, draw_cuts
from pipelines.loaders.reading import Batch, ReadPlan
from pipelines.pixels import BadImageError, decode, to_rgb
from pipelines.prepare.beton import Beton


class _Epoch(Dataset[tuple[torch.Tensor, int, int]]):
    """Sample at a position of one epoch: (views uint8 (V, S, S, 3), label, row)."""

    def __init__(self, beton: Beton, plan: ReadPlan, epoch: int) -> None:
        self.beton, self.size = beton, plan.size
        self.order = plan.order(beton, epoch)
        heights, widths = beton.heights[self.order], beton.widths[self.order]
        self.cuts = draw_cuts(plan.views, plan.size, heights, widths, plan.seed, epoch)

    @property
    def resizes(self) -> bool:
        return bool(((self.cuts[..., HEIGHT] != self.size) | (self.cuts[..., WIDTH] != self.size)).any())

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, int]:
        row = int(self.order[position])
        data = self.beton.image(row)
        try:
            pixels = data if self.beton.is_raw[row] else np.asarray(to_rgb(decode(data.tobytes())))
        except BadImageError as error:
            raise self.beton.damaged(row, error) from error
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        views = [self._cut(image, *cut) for cut in self.cuts[position].tolist()]
        return torch.stack(views).permute(0, 2, 3, 1), int(self.beton.labels[row]), int(self.beton.rows[row])

    def _cut(self, image: torch.Tensor, top: int, left: int, height: int, width: int, flip: int) -> torch.Tensor:
        view = _crop(image, top, left, height, width)
        if (height, width) != (self.size, self.size):
            # Here, because importing torchvision brings torch's compiler along, which takes seconds.
            from torchvision.transforms.v2 import functional

            view = functional.resize(view, [self.size, self.size], antialias=True)
        return view.flip(-1) if flip else view


def _crop(image: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """A box of an image (3, H, W), black where it leaves the image."""
    bottom, right = top + height, left + width
    if min(top, left) >= 0 and bottom <= image.shape[1] and right <= image.shape[2]:
        return image[:, top:bottom, left:right]
    view = image.new_zeros(3, height, width)
    inside = image[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    y, x = max(-top, 0), max(-left, 0)
    view[:, y : y + inside.shape[1], x : x + inside.shape[2]] = inside
    return view


def _begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """Its batches; the worker processes, forked here, collect no garbage of this process.

    A finalizer that needs threads crashes there, where none of them runs: that of Ray's client, which `ray.shutdown` leaves.
    """
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


class TorchLoader:
    """`pipelines.loaders.reading.Loader` by a DataLoader. Equal to FFCV's for raw images that are not resized, else close."""

    lasting = False

    def __init__(self, beton: Beton, plan: ReadPlan, config: LoaderConfig, device: torch.device) -> None:
        self._beton, self._plan = beton, plan
        self._pinned = device.type == "cuda"
        self.samples = len(beton)
        self.batches = plan.batches(self.samples)
        # Worker processes pay where JPEGs are decoded; small raw images are cut in this process.
        self._workers = config.workers or (0 if beton.is_raw.all() else usable_cores())
        self._ahead = config.batches_ahead
        self.name = f"torchvision loader, {self._workers or 'no'} worker processes"

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        plan = self._plan
        dataset = _Epoch(self._beton, plan, epoch)
        if self._workers and dataset.resizes:
            import torchvision.transforms.v2  # noqa: F401  # here once, not in every worker of every epoch
        loader = DataLoader(
            dataset,
            batch_size=plan.own_batch,
            sampler=plan.positions(self.samples, start).tolist(),
            num_workers=self._workers,
            prefetch_factor=self._ahead if self._workers else None,
            # The open files stay those of this process, even if another command prepares the folder again meanwhile.
            multiprocessing_context="fork" if self._workers else None,
            pin_memory=self._pinned,
        )
        try:
            for views, labels, rows in _begin(loader):
                yield Batch(views, labels, rows)
            return
        except UserError as error:
            # A worker process adds its traceback in front.
            message = str(error).strip().splitlines()[-1].removeprefix("pipelines.common.errors.UserError: ")
        # Raised here, the error keeps no iterator. One that is left to the garbage collector can block it: its end writes to a
        # queue, whose lock the interrupted thread may hold.
        raise UserError(message)

    def close(self) -> None:
        """Nothing outlives an epoch."""
