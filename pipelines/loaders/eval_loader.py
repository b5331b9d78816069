"""Evaluation's batches: each sample once, by the one rule that the server follows too (`pipelines.pixels.EvalRule`)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from pipelines.common.cores import usable_cores
from pipelines.config import LoaderConfig
from pipelines.loaders.reading import Batch, ReadPlan
from pipelines.pixels import BadImageError, EvalRule, decode
from pipelines.prepare.beton import Beton


class EvalLoader:
    """`Loader` for evaluation, whichever loader trains.

    Pillow decodes and resizes in threads, outside Python's lock. Images that are stored as they are needed are copied.
    """

    lasting = True

    def __init__(self, beton: Beton, plan: ReadPlan, config: LoaderConfig) -> None:
        assert plan.rule is not None
        self._beton, self._plan, self._rule = beton, plan, plan.rule
        self.samples = len(beton)
        self.batches = plan.batches(self.samples)
        self._workers, self._ahead = config.workers or usable_cores(), config.batches_ahead
        whole = beton.is_raw & (beton.heights == plan.size) & (beton.widths == plan.size)
        self._as_it_lies = bool(whole.all()) and self._rule.ratio == 1
        self.name = "evaluation loader" + ("" if self._as_it_lies else f", {self._workers} threads")

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Every epoch is the same: the file's order."""
        positions = self._plan.positions(self.samples, start)
        step = self._plan.own_batch
        chunks = [positions[i : i + step] for i in range(0, len(positions), step)]
        with ThreadPoolExecutor(self._workers) as pool:
            pending: list[tuple[np.ndarray, list[Future[np.ndarray]]]] = []
            try:
                for rows in chunks:
                    pending.append(
                        (
                            rows,
                            []
                            if self._as_it_lies
                            else [pool.submit(eval_image, self._beton, row, self._rule) for row in rows.tolist()],
                        )
                    )
                    if len(pending) > self._ahead:
                        yield self._batch(*pending.pop(0))
                while pending:
                    yield self._batch(*pending.pop(0))
            finally:
                for _, futures in pending:
                    for future in futures:
                        future.cancel()

    def _batch(self, rows: np.ndarray, images: list[Future[np.ndarray]]) -> Batch:
        pixels = [image.result() for image in images] if images else [self._beton.image(row) for row in rows.tolist()]
        views = torch.from_numpy(np.stack(pixels))[:, None]
        return Batch(views, torch.from_numpy(self._beton.labels[rows].astype(np.int64)), torch.from_numpy(rows))

    def close(self) -> None:
        """Nothing outlives an epoch."""


def eval_image(beton: Beton, row: int, rule: EvalRule) -> np.ndarray:
    """Read one image as evaluation sees it.

    Args:
        beton: The file.
        row: Of the image.
        rule: What evaluation shows of an image.

    Returns:
        uint8 (S, S, 3).

    Raises:
        UserError: The image is damaged.
    """
    data = beton.image(row)
    try:
        return rule(decode(data if beton.is_raw[row] else data.tobytes()))
    except BadImageError as error:
        raise beton.damaged(row, error) from error
