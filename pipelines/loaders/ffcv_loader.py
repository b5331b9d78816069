"""FFCV decodes each image once and cuts every view of it, in threads that hold no Python lock.

What is FFCV's: the file, the memory map, compilation, the pipeline thread and its ring of buffers.
What is ours: the decoder below, the order, the draws (`pipelines.loaders.cuts`), and errors that surface.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import torch

from pipelines.common.cores import usable_cores
from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders.cache import PageReader
from pipelines.loaders.cuts import draw_cuts
from pipelines.loaders.reading import Batch, ReadPlan
from pipelines.pixels import BadImageError, decode, to_rgb
from pipelines.prepare.beton import Beton

# Two parallel loaders at once abort under numba's own threading layer ("workqueue").
numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]
_torch_threads = torch.get_num_threads()
# FFCV compiles a table of two entries on import, 2.5 s in every process; it reads it as any dict.
_typed_dict, numba.typed.Dict = numba.typed.Dict, dict
from ffcv.loader import Loader as FFCVFileLoader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.loader.loader import OrderOption  # noqa: E402
from ffcv.pipeline import PipelineSpec  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

from pipelines.loaders.cut_kernel import PADDING, Table, Work, cut_batch, cut_pixels, make_work  # noqa: E402  # isort: skip
from pipelines.loaders.turbojpeg import Decoders  # noqa: E402  # isort: skip

numba.typed.Dict = _typed_dict
torch.set_num_threads(_torch_threads)  # importing FFCV sets torch to one thread


class CutViews(Operation):
    """Decode once, cut V views: uint8 (B, V, S, S, 3).

    The epoch's `Table` and the threads' `Work` arrive at run time in the place of FFCV's metadata, so that the draws can change
    every epoch without compiling again. The work is done by `cut_batch`, which numba keeps compiled between runs.
    """

    def __init__(self, views: int, size: int) -> None:
        super().__init__()
        self.views, self.size = views, size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """FFCV's question for the memory of a batch."""
        shape = (self.views, self.size, self.size, 3)
        dtype = np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        """FFCV's question for the function that fills a batch."""

        def cut_views(positions, destination, metadata, storage):  # type: ignore[no-untyped-def]
            table, work = metadata
            cut_batch(positions, destination, table, work)
            return destination[: len(positions)]

        return cut_views


class _Epoch(EpochIterator):
    """FFCV's pipeline thread over one epoch's table; an exception in it reaches the training process."""

    def __init__(
        self,
        loader: FFCVFileLoader,
        positions: np.ndarray,
        order: np.ndarray,
        beton: Beton,
        table: Table,
        work: Work,
        pages: PageReader | None,
    ) -> None:
        self._beton, self._order, self._table, self._work, self._pages = beton, order, table, work, pages
        self._error: BaseException | None = None
        super().__init__(loader, positions)  # starts the thread

    def run(self) -> None:
        self.metadata = {"f0": (self._table, self._work)}
        try:
            super().run()
        except BaseException as error:
            # FFCV would leave the consumer waiting for ever.
            self._error = error
            self.output_queue.put(None)

    def run_pipeline(self, b_ix: int, batch_indices: np.ndarray, batch_slot: int, cuda_event: Any) -> Any:
        if self.terminate_event.is_set():
            raise StopIteration  # FFCV looks at the event only when nobody takes its batches
        if self._pages is not None:
            first = b_ix * self.loader.batch_size
            self._pages.need(first, first + len(batch_indices))
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        for place in np.flatnonzero(self._table.refused[batch_indices]):
            self._second_opinion(int(batch_indices[place]), result[0][place])
        return result

    def _second_opinion(self, position: int, out: np.ndarray) -> None:
        """Decode by Pillow what turbojpeg refuses: it takes warnings, as of a few stray bytes, for errors."""
        row, table = int(self._order[position]), self._table
        try:
            image = to_rgb(decode(self._beton.image(row).tobytes()))
            if image.size != (table.width[position], table.height[position]):
                recorded = f"{table.width[position]}x{table.height[position]}"
                raise BadImageError(f"{image.width}x{image.height} pixels, recorded as {recorded}")
        except BadImageError as error:
            raise self._beton.damaged(row, error) from error
        pixels = np.frombuffer(image.tobytes() + bytes(PADDING), np.uint8)[: 3 * image.width * image.height]
        cut_pixels(pixels.reshape(image.height, image.width, 3), table.cuts[position], out, self._work)

    def __next__(self) -> Any:
        if self.terminate_event.is_set():
            raise RuntimeError("this epoch has been closed: a loader runs one epoch at a time")
        try:
            return super().__next__()
        except StopIteration:
            if isinstance(self._error, (UserError, OSError)):
                raise self._error from None
            if self._error is not None:
                raise RuntimeError(f"the FFCV pipeline stopped: {self._error}") from self._error
            raise

    def end(self) -> None:
        """Stop the thread and wait for it."""
        self.close()
        while self.is_alive():
            while not self.output_queue.empty():
                self.output_queue.get_nowait()
            self.join(timeout=0.05)
        if self._pages is not None:
            self._pages.close()


class FFCVLoader:
    """`pipelines.loaders.reading.Loader` by FFCV. The whole file is memory-mapped; the operating system caches it."""

    lasting = False

    def __init__(self, beton: Beton, plan: ReadPlan, config: LoaderConfig) -> None:
        self._plan = plan
        self._beton, self._labels = beton, torch.from_numpy(beton.labels.copy())
        self.samples = len(beton)
        self.batches = plan.batches(self.samples)
        cores = usable_cores()
        # Copying small raw images keeps one thread idle most of the time; JPEG decoding needs all there are.
        workers = min(config.workers or (1 if beton.is_raw.all() else cores), cores)
        self._decoders = Decoders(workers)
        self._work = make_work(self._decoders.handles, plan.size, beton.heights, beton.widths)
        threads = torch.get_num_threads()
        Compiler.set_enabled(False)  # what runs is compiled already; FFCV's own functions would take seconds, every time
        try:
            self._loader = FFCVFileLoader(
                # Of several, the table knows where each image lies. The open file: FFCV would look for its name again.
                f"/proc/self/fd/{beton.files[0]}",
                batch_size=plan.own_batch,
                num_workers=workers,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                drop_last=plan.drop_last,
                batches_ahead=config.batches_ahead,
                seed=0,  # unused: order and draws are ours
                pipelines={
                    "image": PipelineSpec("image", decoder=CutViews(len(plan.views), plan.size), transforms=[]),
                    "label": None,
                },
            )
        finally:
            Compiler.set_enabled(True)
            torch.set_num_threads(threads)  # FFCV sets torch's threads to its own
        cache = "files mapped into memory" if plan.group is None else f"{plan.group} pages read ahead"
        self.name = f"FFCV loader, {workers} thread{'s' if workers > 1 else ''}, {cache}"
        self._running: _Epoch | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        plan = self._plan
        order = plan.order(self._beton, epoch)
        heights, widths = self._beton.heights[order], self._beton.widths[order]
        table = Table(
            self._beton.addresses[order],
            self._beton.sizes[order],
            (~self._beton.is_raw[order]).astype(np.int32),
            heights.astype(np.int32),
            widths.astype(np.int32),
            draw_cuts(plan.views, plan.size, heights, widths, plan.seed, epoch),
            np.zeros(len(order), np.int32),
        )
        positions = plan.positions(self.samples, start)
        if len(positions) == 0:
            return
        self._end_epoch()
        threads = torch.get_num_threads()
        pages = None
        if plan.group is not None:
            pages = PageReader(self._beton, order[positions], positions, table.address, plan.group, plan.seed, epoch)
        running = self._running = _Epoch(self._loader, positions, order, self._beton, table, self._work, pages)
        try:
            for number in itertools.count():
                begin = number * plan.own_batch
                try:
                    (views,) = next(running)
                except StopIteration:
                    return
                if number == 0:
                    torch.set_num_threads(threads)  # the thread has set it to its own by now
                rows = order[positions[begin : begin + len(views)]]
                yield Batch(torch.from_numpy(views), self._labels[rows], torch.from_numpy(self._beton.rows[rows]))
        finally:
            running.end()

    def _end_epoch(self) -> None:
        if self._running is not None:
            self._running.end()
            self._running = None

    def close(self) -> None:
        """End the threads. The next epoch starts new ones."""
        self._end_epoch()
