"""A small data set held as uint8 in the memory of the device that trains: shuffled, cut and flipped there, in batch.

No thread, no file and no copy stands between the images and the network; on a GPU nothing waits for the host within an epoch.
The order and the draws are those of every other loader, so for images that are copied, not resized, the batches are equal to
the bit.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from pipelines.config import RandomCrop, View
from pipelines.loaders.cache import available_memory
from pipelines.loaders.cuts import FLIP, HEIGHT, LEFT, TOP, WIDTH, draw_cuts
from pipelines.loaders.reading import Batch, ReadPlan
from pipelines.prepare.beton import Beton

_SHARE = 0.25  # of the device's free memory, for the images
_LARGEST = 8 << 30  # bytes: beyond, holding them gains nothing
_AT_ONCE = 1024  # images read together


def margin_of(views: Sequence[View]) -> int:
    """The black pixels around an image, that a random crop may reach."""
    return max((view.cut.padding for view in views if isinstance(view.cut, RandomCrop)), default=0)


def why_not_resident(beton: Beton, device: torch.device, margin: int = 0) -> str | None:
    """Say why a file's images cannot be held in a device's memory.

    Args:
        beton: The file.
        device: The device.
        margin: Pixels around each image.

    Returns:
        The reason; None: they can be held.
    """
    heights, widths = beton.heights, beton.widths
    if not beton.is_raw.all():
        return "the images are stored as JPEG (data.store.mode: raw stores pixels)"
    if len(np.unique(heights)) > 1 or len(np.unique(widths)) > 1:
        return "the images have different sizes (data.store.square makes them alike)"
    size = 4 * len(beton) * (int(heights[0]) + 2 * margin) * (int(widths[0]) + 2 * margin)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if size > min(_LARGEST, _SHARE * free):
        return f"they take {size / 1e9:.1f} GB, and {device.type} has {free / 1e9:.1f} GB free"
    return None


_Key = tuple[tuple[tuple[Path, int], ...], str, int]  # files and when they were written, device, margin


class _Pixels:
    """All images of a file with a black margin: uint8 (N, H + 2p, W + 2p, 4); shared by the loaders of one data set.

    The fourth byte is unused: it makes a pixel one word (`words`), which gathers several times as fast as three bytes.
    """

    _held: ClassVar[weakref.WeakValueDictionary[_Key, _Pixels]] = weakref.WeakValueDictionary()

    def __init__(self, beton: Beton, device: torch.device, margin: int) -> None:
        self.height, self.width = int(beton.heights[0]), int(beton.widths[0])
        shape = (len(beton), self.height + 2 * margin, self.width + 2 * margin, 4)
        self.padded = torch.zeros(shape, dtype=torch.uint8, device=device)
        inner = self.padded[:, margin : margin + self.height, margin : margin + self.width, :3]
        for rows in torch.arange(len(beton)).split(_AT_ONCE):  # the host holds no second copy of all
            pixels = torch.from_numpy(np.stack([beton.image(int(row)) for row in rows]))
            inner[rows[0] : rows[-1] + 1] = pixels.to(device)
        self.words = self.padded.view(torch.int32).view(-1)
        self.labels = torch.from_numpy(beton.labels.copy()).to(device)
        self.rows = torch.from_numpy(beton.rows).to(device)

    @classmethod
    def of(cls, beton: Beton, device: torch.device, margin: int) -> _Pixels:
        written = [os.fstat(file).st_mtime_ns for file in beton.files]
        key = (tuple(zip(beton.paths, written, strict=True)), str(device), margin)
        found = cls._held.get(key)
        if found is None:
            found = cls._held[key] = cls(beton, device, margin)
        return found


class ResidentLoader:
    """`pipelines.loaders.reading.Loader` of images in `device`'s memory; its batches are there too."""

    lasting = True

    def __init__(self, beton: Beton, plan: ReadPlan, device: torch.device) -> None:
        self._beton, self._plan, self._device = beton, plan, device
        self._margin = margin_of(plan.views)
        self._pixels = _Pixels.of(beton, device, self._margin)
        self.samples = len(beton)
        self.batches = plan.batches(self.samples)
        self.name = f"resident loader, {self._pixels.padded.nbytes / 1e6:,.0f} MB in {device.type} memory"

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        plan, pixels = self._plan, self._pixels
        order = plan.order(self._beton, epoch)
        heights, widths = (np.full(len(order), side) for side in (pixels.height, pixels.width))
        cuts = draw_cuts(plan.views, plan.size, heights, widths, plan.seed, epoch)
        positions = plan.positions(self.samples, start)
        # All of an epoch at once: nothing goes to the device between two steps.
        rows, boxes = torch.from_numpy(order[positions]).to(self._device), torch.from_numpy(cuts[positions]).to(self._device)
        resized = ((cuts[..., HEIGHT] != plan.size) | (cuts[..., WIDTH] != plan.size)).any(0).tolist()
        for part in torch.arange(len(positions)).split(plan.own_batch):
            own = slice(int(part[0]), int(part[-1]) + 1)
            yield Batch(self._views(rows[own], boxes[own], resized), pixels.labels[rows[own]], pixels.rows[rows[own]])

    def close(self) -> None:
        """Nothing runs between batches."""

    def _views(self, rows: torch.Tensor, boxes: torch.Tensor, resized: list[bool]) -> torch.Tensor:
        if not any(resized):
            return self._copied(rows, boxes)
        views = [
            (self._resized if resize else self._copied)(rows, boxes[:, number : number + 1])
            for number, resize in enumerate(resized)
        ]
        return torch.cat(views, dim=1)

    def _copied(self, rows: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """The boxes of the output's size: uint8 (B, V, S, S, 3) with a stride of 4 a pixel, by one gather."""
        size, padded = self._plan.size, self._pixels.padded
        along = torch.arange(size, device=self._device)
        y = boxes[..., TOP, None] + (self._margin + along)
        flip = boxes[..., FLIP, None] != 0
        x = boxes[..., LEFT, None] + self._margin + torch.where(flip, size - 1 - along, along)
        lines = rows[:, None, None] * padded.shape[1] + y
        places = (lines * padded.shape[2])[..., :, None] + x[..., None, :]
        return self._pixels.words.index_select(0, places.view(-1)).view(torch.uint8).view(*places.shape, 4)[..., :3]

    def _resized(self, rows: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes of any size, resized as torchvision's antialiased bilinear does: two small matrices an image."""
        pixels, margin = self._pixels, self._margin
        inner = pixels.padded[rows, margin : margin + pixels.height, margin : margin + pixels.width, :3]
        down = self._weights(boxes[:, 0, TOP], boxes[:, 0, HEIGHT], pixels.height)
        across = self._weights(boxes[:, 0, LEFT], boxes[:, 0, WIDTH], pixels.width)
        flip = (boxes[:, 0, FLIP] != 0)[:, None, None]
        across = torch.where(flip, across.flip(1), across)
        lines = torch.einsum("bsh,bhwc->bswc", down, inner.float())
        return torch.einsum("btw,bswc->bstc", across, lines).add_(0.5).clamp_(0, 255).to(torch.uint8)[:, None]

    def _weights(self, first: torch.Tensor, length: torch.Tensor, whole: int) -> torch.Tensor:
        """What each of S output pixels takes of each of `whole` source pixels: float32 (B, S, whole), rows adding up to 1."""
        size = self._plan.size
        scale = (length.float() / size)[:, None, None]
        centre = first[:, None, None] + (torch.arange(size, device=self._device)[:, None] + 0.5) * scale
        source = torch.arange(whole, device=self._device) + 0.5
        weights = (1 - (source - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
        inside = (source > first[:, None, None]) & (source < (first + length)[:, None, None])
        weights = weights * inside
        return weights / weights.sum(-1, keepdim=True)
