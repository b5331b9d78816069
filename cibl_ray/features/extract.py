"""Images of a prepared split to the features of a frozen backbone, by all cores or a GPU, computed once."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from cibl_ray.features.store import FeatureStore, digests_of, weights_digest
from cibl_ray.hardware import enough_memory, one_thread_a_core
from cibl_ray.networks.precision import at_least_float32
from pipelines.augment.recipe import Augment, Normalize
from pipelines.common.cores import usable_cores
from pipelines.common.seeding import stream
from pipelines.common.words import plural
from pipelines.config import DataConfig, LoaderConfig
from pipelines.loaders.eval_loader import eval_image
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import ReadPlan, eval_rule
from pipelines.prepare.beton import Beton
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)

# 2: a change of how pixels or features are made that no other part of the key tells.
_VERSION = 1
# Images that a core takes at once: activations that stay in its cache are twice as fast as batches of 32 (Lite0, 224 pixels).
_AT_ONCE_CPU, _AT_ONCE_GPU = 4, 128
_KEEP_EVERY = 60.0  # seconds between files, so that a long extraction that is stopped continues there
_SAY_EVERY = 15.0  # seconds between lines of progress

Tell = Callable[[str], None]


class Extractor:
    """Computes features, and keeps them in the prepared data's folder.

    Args:
        backbone: Images (M, 3, S, S) to features (M, d), on `device`. It is left in evaluation mode.
        name: The backbone's, for messages.
        data: Rule of the pixels, and the folder below which features are kept.
        loader: Of the augmented views.
        device: Where the backbone is.
        tell: Gets lines of progress; by default the log.
        code: Digest of the code of a backbone of the user's own, which may change while its weights do not.
    """

    def __init__(
        self,
        backbone: nn.Module,
        name: str,
        data: DataConfig,
        loader: LoaderConfig,
        device: torch.device,
        tell: Tell = log.info,
        code: str | None = None,
    ) -> None:
        self.backbone, self.name, self.data, self.loader = backbone.eval(), name, data, loader
        self.device, self.tell = device, tell
        self.normalize = Normalize(data).to(device)
        self._weights, self._code = weights_digest(backbone), code

    def split(self, prepared: Prepared, split: str, bf16: bool = False, views: int = 0, seed: int = 0) -> torch.Tensor:
        """The features of a split's images, read where they are known and computed where they are not.

        Args:
            prepared: The data.
            split: 'train', 'val' or 'test'.
            bf16: Compute in bf16 mixed precision, twice as fast on CPUs that have it.
            views: Augmented views of each image beside the one of evaluation.
            seed: Of the views' draws.

        Returns:
            float32 (N, 1 + views, d), on the CPU, in the split's order; the first is that of evaluation's rule.

        Raises:
            UserError: An image is damaged, memory or disk do not suffice.
        """
        beton = prepared.beton(split)
        digests = digests_of(beton)
        parts = [self._plain(beton, digests, split, bf16)]
        parts += [self._augmented(prepared, digests, split, bf16, number, seed) for number in range(views)]
        return torch.stack(parts, dim=1)

    def _store(self, bf16: bool, **more: Any) -> FeatureStore:
        what = {
            "version": _VERSION,
            "weights": self._weights,
            "mean": self.data.mean,
            "std": self.data.std,
            "precision": "bf16" if bf16 else "fp32",
            **more,
        }
        if self._code is not None:
            what["code"] = self._code
        return FeatureStore(self.data.prepared / "features", what)

    def _plain(self, beton: Beton, digests: np.ndarray, split: str, bf16: bool) -> torch.Tensor:
        """Under evaluation's rule, (N, d)."""
        rule = eval_rule(self.data)
        # How images are stored decides their bytes, and so their digests, not what is made of them.
        store = self._store(bf16, rule=asdict(rule))
        there, known = store.read(digests)
        missing = np.flatnonzero(~there)
        if not len(missing):
            assert known is not None
            self.tell(f"features of {split}: {plural(len(digests), 'image')}, all known")
            return known
        again = f", {len(digests) - len(missing):,} known" if len(missing) < len(digests) else ""
        self.tell(f"features of {split}: {self.name} on {plural(len(missing), 'image')}{again}")

        def pixels(rows: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.stack([eval_image(beton, int(row), rule) for row in rows]))[:, None]

        computed, done, kept, started = [], 0, 0, time.monotonic()
        saved = reported = started
        for part in self._each(missing, pixels, bf16):
            computed.append(part)
            done += len(part)
            now = time.monotonic()
            if now - reported > _SAY_EVERY and done < len(missing):
                rate = done / (now - started)
                self.tell(f"  {done:,} of {len(missing):,}, {rate:.0f} images/s, {(len(missing) - done) / rate:.0f} s left")
                reported = now
            if now - saved > _KEEP_EVERY or done == len(missing):
                store.add(digests[missing[kept:done]], torch.cat(computed)[kept:done])
                saved, kept = now, done
        seconds = time.monotonic() - started
        self.tell(f"  {done:,} images in {seconds:.1f} s, {done / seconds:.0f} images/s; kept in {store.folder}")
        fresh = torch.cat(computed)
        features = fresh.new_empty(len(digests), fresh.shape[1])
        features[torch.from_numpy(missing)] = fresh
        if known is not None:
            features[torch.from_numpy(there)] = known
        return features

    def _augmented(
        self, prepared: Prepared, digests: np.ndarray, split: str, bf16: bool, number: int, seed: int
    ) -> torch.Tensor:
        """Of augmented view `number` of each image, (N, d): cut and changed by the first of `data.views`."""
        view, size = self.data.views[0], self.data.size
        # What is drawn for an image follows from its place among the others. A copy of it elsewhere has draws of its own.
        order = hashlib.sha256(digests.tobytes()).hexdigest()
        store = self._store(bf16, view=view.model_dump(mode="json"), size=size, number=number, seed=seed, images=order)
        places = np.arange(len(digests), dtype=np.uint64)
        there, known = store.read(places)
        if known is not None and there.all():
            return known
        self.tell(f"features of {split}: augmented view {number + 1}")
        draws = int(stream(seed, "feature view", number).integers(2**32))
        plan = ReadPlan((view,), size, 64, draws, sampling=None, drop_last=False)
        loader = make_loader(prepared, split, plan, self.loader)
        augment, parts = Augment((view,), size, draws), []
        try:
            for step, batch in enumerate(loader.epoch(0)):
                images = augment(batch.views, 0, step).clone()
                rows = np.arange(len(images))
                parts += [*self._each(rows, lambda rows, images=images: images[torch.from_numpy(rows)], bf16)]  # type: ignore[misc]
        finally:
            loader.close()
        features = torch.cat(parts)
        store.add(places, features)
        return features

    def _each(self, rows: np.ndarray, pixels: Callable[[np.ndarray], torch.Tensor], bf16: bool) -> Iterator[torch.Tensor]:
        """The features of images uint8 (B, 1, S, S, 3) that `pixels` makes of some rows, in order.

        On a CPU each core decodes and computes a few images by itself: no core waits for another.
        """
        cpu = self.device.type == "cpu"
        at_once = _AT_ONCE_CPU if cpu else _AT_ONCE_GPU
        chunks = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]

        @torch.inference_mode()
        def features(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                return at_least_float32(self.backbone(self.normalize(images.to(self.device)))).cpu()

        def work(chunk: np.ndarray) -> torch.Tensor:
            return features(pixels(chunk))

        with (
            enough_memory(f"features of {at_once} images at once", "free some memory, or choose a smaller network.backbone"),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False),
        ):
            if cpu:
                with one_thread_a_core() as pool:
                    yield from _in_order(pool, work, chunks, 4 * usable_cores())
            else:
                with ThreadPoolExecutor(usable_cores()) as pool:
                    for images in _in_order(pool, pixels, chunks, 4):
                        yield features(images)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[np.ndarray], torch.Tensor], chunks: list[np.ndarray], ahead: int
) -> Iterator[torch.Tensor]:
    pending = [pool.submit(work, chunk) for chunk in chunks[:ahead]]
    following = iter(chunks[ahead:])
    try:
        while pending:
            done = pending.pop(0).result()
            if (chunk := next(following, None)) is not None:
                pending.append(pool.submit(work, chunk))
            yield done
    finally:
        for future in pending:
            future.cancel()
