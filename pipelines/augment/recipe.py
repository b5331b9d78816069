"""From the loader's bytes to the network's input, in batch, on the device that trains."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from types import ModuleType

import torch
from torch import nn

from pipelines.augment.apply import apply
from pipelines.augment.draws import Stage, draw
from pipelines.common.seeding import stream
from pipelines.config import DataConfig, View

log = logging.getLogger(__name__)


class Normalize(nn.Module):
    """uint8 views (B, V, S, S, 3) to float32 (B*V, 3, S, S), standardised, sample by sample: m = b*V + v.

    The result is channels-last in memory, as the bytes came, so no value is moved but to be converted.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        std = torch.tensor(data.std)
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-torch.tensor(data.mean) / std).view(3, 1, 1), persistent=False)
        self.scale: torch.Tensor
        self.shift: torch.Tensor

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Normalised pixels, float32 (B·V, 3, S, S), channels-last, of views uint8 (B, V, S, S, 3)."""
        pixels = views.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        return torch.addcmul(self.shift, pixels, self.scale)


class Augment(nn.Module):
    """Each view's recipe (`View.augment`) on its pixels, each sample by its own draw.

    A draw depends on the seed, the epoch, the step and the sample's row in the batch alone: a resumed run draws the same, and
    so does another device.
    """

    def __init__(self, views: tuple[View, ...], size: int, seed: int) -> None:
        super().__init__()
        self.recipes = tuple(view.augment for view in views)
        self.size, self.seed = size, seed

    def draw(self, view: int, epoch: int, step: int, batch: int) -> list[Stage]:
        """Draw what happens to one view of each sample.

        Args:
            view: The view's number.
            epoch: The epoch.
            step: The step within the epoch.
            batch: How many samples there are.

        Returns:
            The stages, in order.
        """
        stages = []
        for number, part in enumerate(self.recipes[view]):
            stages += draw(part, self.size, batch, stream(self.seed, "augment", epoch, step, view, number))
        return stages

    def forward(
        self, views: torch.Tensor, epoch: int, step: int, rows: slice | None = None, batch: int | None = None, steps: int = 1
    ) -> torch.Tensor:
        """Augment views.

        Args:
            views: uint8 (B, V, S, S, 3).
            epoch: The epoch.
            step: The step within the epoch.
            rows: Where several processes share a batch, which of its rows these views are. Their draws are then those that
                one process would make for the whole.
            batch: How many samples the whole batch has; None: B.
            steps: The views are those of so many steps, from `step` on, one after the other. Each keeps its draws, and a GPU
                launches as many kernels for all as for one.

        Returns:
            Augmented views of the same shape; the same tensor where no view has a recipe.
        """
        if not any(self.recipes):
            return views
        assert views.shape[1:] == (len(self.recipes), self.size, self.size, 3), f"views of shape {tuple(views.shape)}"
        views = views.contiguous()
        result = torch.empty_like(views)
        for number, recipe in enumerate(self.recipes):
            if not recipe:
                result[:, number] = views[:, number]
                continue
            whole = len(views) // steps if batch is None else batch
            drawn = [self.draw(number, epoch, step + more, whole) for more in range(steps)]
            if rows is not None:
                drawn = [[stage.rows(rows) for stage in stages] for stages in drawn]
            stages = [Stage.join(same) for same in zip(*drawn, strict=True)] if steps > 1 else drawn[0]
            kernel = _kernel() if views.device.type == "cpu" else None
            if kernel is not None:
                kernel.augment(views, result, number, stages)
                continue
            planes = views[:, number].permute(0, 3, 1, 2).contiguous()  # each channel by itself: what follows runs on vectors
            planes = apply(stages, planes)
            for channel in range(3):
                result[:, number, ..., channel] = planes[:, channel]
        return result


@cache
def _kernel() -> ModuleType | None:
    """`pipelines.augment.recipe.pixel_kernel`, where numba is installed and works."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from pipelines.augment import pixel_kernel
    except (ImportError, RuntimeError) as error:  # no place to keep what it compiles, or another NumPy than it knows
        log.warning("augmentation runs without numba, more slowly: %s", str(error).partition("\n")[0])
        return None
    return pixel_kernel
