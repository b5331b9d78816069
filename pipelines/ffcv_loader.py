"""FFCV decodes each image once and cuts every view of it, in threads that hold no Python lock.

What is FFCV's: the file, the memory map, compilation, the pipeline thread and its ring of buffers.
What is ours: the decoder below, the order, the draws (`pipelines.cuts`), and errors that surface.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import torch

from pipelines.batch import Batch, Reading
from pipelines.beton import RAW, Beton
from pipelines.config import LoaderConfig
from pipelines.cores import usable_cores
from pipelines.cuts import draw_cuts, epoch_order
from pipelines.errors import UserError
from pipelines.pixels import BadImageError, decode, to_rgb

# Two parallel loaders at once abort under numba's own threading layer ("workqueue").
numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]
_torch_threads = torch.get_num_threads()
from ffcv.loader import Loader as FFCVFileLoader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.loader.loader import OrderOption  # noqa: E402
from ffcv.pipeline import PipelineSpec  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

from ffcv.libffcv import imdecode, resize_crop  # noqa: E402  # isort: skip

torch.set_num_threads(_torch_threads)  # importing FFCV sets torch to one thread


class CutViews(Operation):
    """Decode once, cut V views: uint8 (B, V, S, S, 3).

    The epoch's table (image records, cuts, refused) arrives at run time in the place of FFCV's metadata, in the epoch's order,
    so that the draws can change every epoch without compiling anew. `refused` is set where turbojpeg reports a problem.
    """

    def __init__(self, views: int, size: int) -> None:
        super().__init__()
        self.views, self.size = views, size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (self.views, self.size, self.size, 3)
        dtype = np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        read = self.memory_read
        each = Compiler.get_iterator()
        raw = RAW
        decode_jpeg = Compiler.compile(imdecode)
        cut_all = _compiled_cut()

        def cut_views(positions, destination, table, storage):  # type: ignore[no-untyped-def]
            records, cuts, refused = table
            for i in each(len(positions)):
                position = positions[i]
                record = records[position]
                data = read(record["data_ptr"], storage)
                height, width = np.uint32(record["height"]), np.uint32(record["width"])
                if record["mode"] == raw:
                    image = data.reshape(height, width, 3)
                else:
                    image = np.empty((height, width, 3), np.uint8)
                    status = decode_jpeg(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
                    refused[position] = status != 0
                cut_all(image, cuts[position], destination[i])
            return destination[: len(positions)]

        cut_views.is_parallel = True  # type: ignore[attr-defined]
        return cut_views


@functools.cache
def _compiled_cut() -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """The function that cuts all views of a decoded image: image (H, W, 3), cuts (V, 5), out (V, S, S, 3)."""
    resize, copy_box, mirror = (Compiler.compile(function) for function in (resize_crop, _copy_box, _mirror))

    def cut_all(image, cuts, out):  # type: ignore[no-untyped-def]
        size = out.shape[1]
        for v in range(out.shape[0]):
            top, left, h, w, flip = cuts[v]
            if h == size and w == size:
                copy_box(image, top, left, out[v])
            else:
                resize(image, top, top + h, left, left + w, out[v])
            if flip:
                mirror(out[v])

    return Compiler.compile(cut_all)


def _copy_box(image, top, left, out):  # type: ignore[no-untyped-def]
    """The box at (top, left) of `out`'s size, black where it leaves the image."""
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            inside = 0 <= top + y < image.shape[0] and 0 <= left + x < image.shape[1]
            for c in range(3):
                out[y, x, c] = image[top + y, left + x, c] if inside else 0


def _mirror(out):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    for y in range(out.shape[0]):
        for x in range(width // 2):
            for c in range(3):
                out[y, x, c], out[y, width - 1 - x, c] = out[y, width - 1 - x, c], out[y, x, c]


class _Epoch(EpochIterator):
    """FFCV's pipeline thread over one epoch's table; an exception in it reaches the training process."""

    def __init__(
        self, loader: FFCVFileLoader, positions: np.ndarray, order: np.ndarray, cuts: np.ndarray, beton: Beton
    ) -> None:
        self._beton, self._order, self._cuts = beton, order, cuts
        self._refused = np.zeros(len(order), dtype=np.int32)  # not uint8: FFCV marks that array type read-only
        self._table = {"f0": (beton.records["f0"][order], cuts, self._refused)}
        self._error: BaseException | None = None
        super().__init__(loader, positions)  # starts the thread

    def run(self) -> None:
        self.metadata = self._table
        try:
            super().run()
        except BaseException as error:
            # FFCV would leave the consumer waiting for ever.
            self._error = error
            self.output_queue.put(None)

    def run_pipeline(self, b_ix: int, batch_indices: np.ndarray, batch_slot: int, cuda_event: Any) -> Any:
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        for place in np.flatnonzero(self._refused[batch_indices]):
            self._second_opinion(int(batch_indices[place]), result[0][place])
        return result

    def _second_opinion(self, position: int, out: np.ndarray) -> None:
        """Decode by Pillow what turbojpeg refuses: it takes warnings, as of a few stray bytes, for errors."""
        row = int(self._order[position])
        try:
            image = np.asarray(to_rgb(decode(self._beton.image(row).tobytes())))
        except BadImageError as error:
            raise UserError(f"{self._beton.where(row)} is damaged ({error}); remove the folder and prepare again") from error
        _compiled_cut()(image, self._cuts[position], out)

    def __next__(self) -> Any:
        if self.terminate_event.is_set():
            raise RuntimeError("this epoch has been closed: a loader runs one epoch at a time")
        try:
            return super().__next__()
        except StopIteration:
            if isinstance(self._error, UserError):
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


class FFCVLoader:
    """`pipelines.batch.Loader` by FFCV. The whole file is memory-mapped; the operating system caches it."""

    def __init__(self, beton: Beton, reading: Reading, config: LoaderConfig) -> None:
        self._reading = reading
        self._beton, self._labels = beton, torch.from_numpy(beton.labels.copy())
        self.samples = len(beton)
        self.batches = reading.batches(self.samples)
        all_raw = bool((beton.records["f0"]["mode"] == RAW).all())
        cores = usable_cores()
        # Copying small raw images keeps one thread idle most of the time; JPEG decoding needs all there are.
        workers = min(config.workers or (1 if all_raw else cores), cores)
        threads = torch.get_num_threads()
        self._loader = FFCVFileLoader(
            str(beton.path.resolve()),
            batch_size=reading.own_batch,
            num_workers=workers,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            drop_last=reading.drop_last,
            batches_ahead=config.batches_ahead,
            seed=0,  # unused: order and draws are ours
            pipelines={
                "image": PipelineSpec("image", decoder=CutViews(len(reading.views), reading.size), transforms=[]),
                "label": None,
            },
        )
        torch.set_num_threads(threads)  # FFCV sets torch's threads to its own
        self.name = f"FFCV loader, {workers} thread{'s' if workers > 1 else ''}"
        self._running: _Epoch | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        reading = self._reading
        order = epoch_order(self._beton.labels, reading.sampling, reading.seed, epoch)
        records = self._beton.records["f0"][order]
        cuts = draw_cuts(reading.views, reading.size, records["height"], records["width"], reading.seed, epoch)
        positions = reading.positions(self.samples, start)
        if len(positions) == 0:
            return
        self.close()
        threads = torch.get_num_threads()
        running = self._running = _Epoch(self._loader, positions.astype(np.uint64), order, cuts, self._beton)
        try:
            for number in itertools.count():
                begin = number * reading.own_batch
                try:
                    (views,) = next(running)
                except StopIteration:
                    return
                if number == 0:
                    torch.set_num_threads(threads)  # the thread has set it to its own by now
                rows = torch.from_numpy(order[positions[begin : begin + len(views)]])
                yield Batch(torch.from_numpy(views), self._labels[rows], rows)
        finally:
            running.end()

    def close(self) -> None:
        if self._running is not None:
            self._running.end()
            self._running = None
