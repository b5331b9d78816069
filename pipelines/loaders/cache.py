"""Where stored images are read from: files mapped into memory, or pages read ahead into this process.

Mapped files are shared by all processes of a machine and any image can come at any time; right where the data fit into memory.
Where they do not, every image would cost a seek. Then the order is made random within groups of pages only, and each group is
read in large pieces while the one before is used.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipelines.common.seeding import stream
from pipelines.prepare.beton import PAGE, Beton

_READERS = 4  # reads at once: network storage answers several faster than one
_SHARE = 0.8  # of the memory that is free, for the data; the rest is for the network and the batches
_AFTER = 64  # bytes after a group that vectors may read


def available_memory() -> int:
    """Bytes that this process may still use: what the machine has free, or what its control groups leave it, if that is less.

    What is cached of files counts as free: it is given up when something else needs the room.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            top, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / place.lstrip("/")
        # The least limit up the tree holds. In a container the path may be the host's: then only the top is there.
        for folder in (group, *group.parents):
            free = min(free, _left(folder, *names))
            if folder == top:
                break
    return max(0, free)


def _left(group: Path, limit_name: str, used_name: str) -> int:
    limit, used = _lines(group / limit_name), _lines(group / used_name)
    if not (limit and used and limit[0].isdecimal()):
        return 1 << 62
    stat = dict(line.split() for line in _lines(group / "memory.stat"))
    names = ("inactive_file", "active_file", "slab_reclaimable")
    cached = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in names)
    return int(limit[0]) - int(used[0]) + cached


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def fits_into_memory(size: int) -> bool:
    """Whether so many bytes of files can stay in this machine's memory beside training."""
    return size <= _SHARE * available_memory()


def local_workers() -> int:
    """How many training processes share this machine, as Ray Train and torchrun say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def by_pages(order: np.ndarray, pages: np.ndarray, group: int, seed: int, epoch: int) -> np.ndarray:
    """Order rows by groups of pages: those of `group` pages that are drawn at random, then those of the next, and so on.

    Args:
        order: Rows, int64 (N,). Within a group they stay in this order.
        pages: The page of each row, as `Beton.pages`.
        group: Pages that are read together.
        seed: Of the draw.
        epoch: Of the draw.

    Returns:
        The rows, int64 (N,).
    """
    return order[np.argsort(_groups(pages, group, seed, epoch)[order], kind="stable")]


def _groups(pages: np.ndarray, group: int, seed: int, epoch: int) -> np.ndarray:
    """The number of each row's group: int64 (N,)."""
    present, place = np.unique(pages, return_inverse=True)
    drawn: np.ndarray = stream(seed, "pages", epoch).permutation(len(present))[place] // group
    return drawn


class PageReader:
    """The pages of one epoch, a group at a time, in this process's memory: the group in use, and the next.

    rows: in the order of use, already `by_pages` of the same group, seed and epoch. `addresses`, int64 (N,): filled in for each
    of `positions` when its page is there.
    """

    def __init__(
        self,
        beton: Beton,
        rows: np.ndarray,
        positions: np.ndarray,
        addresses: np.ndarray,
        group: int,
        seed: int,
        epoch: int,
    ) -> None:
        self._beton, self._rows, self._positions, self._addresses = beton, rows, positions, addresses
        number = _groups(beton.pages, group, seed, epoch)[rows]
        self._edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(rows)]
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="pages")
        self._coming: dict[int, list[Future[None]]] = {}
        self._held: dict[int, np.ndarray] = {}
        self._read(0)

    def need(self, first: int, last: int) -> None:
        """Wait until the pages of rows number `first` to `last` - 1 are there; those before are given up."""
        using, until = (int(np.searchsorted(self._edges, row, side="right")) - 1 for row in (first, last - 1))
        for number in [number for number in self._held if number < using]:
            del self._held[number]
        for number in range(using, until + 1):
            self._read(number)
            for future in self._coming[number]:
                future.result()
        if until == using:  # a batch that lies across two groups holds both
            self._read(until + 1)

    def close(self) -> None:
        """Give up memory and threads."""
        self._pool.shutdown(cancel_futures=True)
        self._held.clear()

    def _read(self, number: int) -> None:
        """Begin to read a group, unless it was begun."""
        if number in self._coming or number >= len(self._edges) - 1:
            return
        part = slice(self._edges[number], self._edges[number + 1])
        rows = self._rows[part]
        pages, place = np.unique(self._beton.pages[rows], return_inverse=True)
        buffer = self._held[number] = np.empty(len(pages) * PAGE + _AFTER, np.uint8)
        start = self._beton.starts[rows].astype(np.int64)
        self._addresses[self._positions[part]] = buffer.ctypes.data + place * PAGE + start % PAGE
        _, sample = np.unique(place, return_index=True)
        ends = np.zeros(len(pages), np.int64)  # of each page's last image
        np.maximum.at(ends, place, start % PAGE + self._beton.sizes[rows])
        self._coming[number] = [
            self._pool.submit(
                self._page, int(self._beton.shard[rows[one]]), int(start[one]) // PAGE, buffer, slot, int(ends[slot])
            )
            for slot, one in enumerate(sample)
        ]

    def _page(self, shard: int, page: int, buffer: np.ndarray, slot: int, end: int) -> None:
        file, done = self._beton.files[shard], 0
        while done < PAGE:
            got = os.preadv(file, [buffer[slot * PAGE + done : (slot + 1) * PAGE].data], page * PAGE + done)
            if got == 0:  # the end of the file
                break
            done += got
        if done < end:
            raise OSError(f"{str(self._beton.paths[shard])!r} ends before its images do: it was cut short while it was read")
        if local_workers() == 1:  # held here, so the system need not keep it; a neighbour may be about to read it
            os.posix_fadvise(file, page * PAGE, PAGE, os.POSIX_FADV_DONTNEED)
