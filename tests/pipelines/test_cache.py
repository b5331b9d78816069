"""Pages read ahead give the same images as mapped files; parts of the data give every worker its own."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders import cache
from pipelines.loaders.cache import by_pages, fits_into_memory
from pipelines.loaders.make import decide_cache, make_loader
from pipelines.loaders.reading import Batch, ReadPlan, Share, train_plan
from pipelines.prepare.beton import PAGE
from pipelines.prepare.build import ensure_prepared
from tests.conftest import data_config, needs_ffcv

KINDS = [pytest.param("ffcv", marks=needs_ffcv), "torch"]


@pytest.fixture(scope="module")
def photos_in_files(photo_folder, tmp_path_factory):
    """24 raw images of up to 480 kB in files of a page each, so that there is something to read ahead."""
    data = data_config(
        source={"kind": "folder", "path": str(photo_folder)},
        prepared=str(tmp_path_factory.mktemp("prepared")),
        store={"mode": "raw", "shard_mb": 1},
        size=64,
        views=[{"cut": {"kind": "resized"}}] * 2,
    )
    return data, ensure_prepared(data, 0)


def epoch(loader, number=0, start=0) -> list[Batch]:
    return [Batch(b.views.clone(), b.labels.clone(), b.index.clone()) for b in loader.epoch(number, start)]


def rows(batches) -> list[int]:
    return torch.cat([batch.index for batch in batches]).tolist()


def test_order_is_random_within_groups_of_pages():
    pages = np.repeat(np.arange(10), 20)
    order = np.random.default_rng(0).permutation(200)
    found = by_pages(order, pages, group=3, seed=0, epoch=4)
    assert sorted(found.tolist()) == list(range(200))
    groups = [set(pages[found[first : first + 60]].tolist()) for first in (0, 60, 120)]
    assert [len(group) for group in groups] == [3, 3, 3]
    assert not groups[0] & groups[1] & groups[2]
    assert pages[found[:60]].tolist() != sorted(pages[found[:60]].tolist())  # within a group at random
    other = by_pages(order, pages, group=3, seed=0, epoch=5)
    assert set(pages[other[:60]].tolist()) != groups[0]  # and groups are drawn anew each epoch


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_resumes_exactly(photos_in_files, kind):
    data, prepared = photos_in_files
    config = LoaderConfig(kind=kind, cache="process", read_ahead_mb=16, workers=1)
    loader = make_loader(prepared, "train", train_plan(data, 5, 0), config)
    whole = epoch(loader, 2)
    assert len(set(rows(whole))) == 20
    rest = epoch(loader, 2, start=2)
    assert rows(rest) == rows(whole[2:])
    assert all(torch.equal(a.views, b.views) for a, b in zip(whole[2:], rest, strict=True))


@needs_ffcv
@pytest.mark.parametrize("sampling", ["instance", "class_balanced"])
def test_pages_read_ahead_hold_the_same_images(photos_in_files, sampling):
    data, prepared = photos_in_files
    plan = replace(train_plan(data, 4, 0), sampling=sampling)
    group = replace(plan, group=2)
    beton = prepared.beton("train")
    ahead = make_loader(prepared, "train", plan, LoaderConfig(kind="ffcv", cache="process", read_ahead_mb=16))
    for number in range(3):
        order = group.order(beton, number)
        assert rows(epoch(ahead, number)) == order.tolist()
    # The same order through mapped files: the torch loader reads those whatever the cache.
    plain = make_loader(prepared, "train", plan, LoaderConfig(kind="torch", cache="process", read_ahead_mb=16, workers=1))
    for a, b in zip(epoch(ahead, 1), epoch(plain, 1), strict=True):
        assert (a.views.float() - b.views.float()).abs().mean() < 0.5


@needs_ffcv
def test_no_more_than_two_groups_are_held_and_nothing_stays(photos_in_files):
    data, prepared = photos_in_files
    before = threading.active_count()
    loader = make_loader(
        prepared, "train", train_plan(data, 2, 0), LoaderConfig(kind="ffcv", cache="process", read_ahead_mb=16)
    )
    most = 0
    for _ in loader.epoch(0):
        held = loader._running._pages._held
        most = max(most, sum(buffer.nbytes for buffer in list(held.values())))
    assert PAGE < most <= 2 * (2 * PAGE + 64)
    loader.close()
    assert threading.active_count() <= before


@needs_ffcv
def test_a_file_that_cannot_be_read_is_told(photos_in_files, monkeypatch):
    data, prepared = photos_in_files
    loader = make_loader(prepared, "train", train_plan(data, 2, 0), LoaderConfig(kind="ffcv", cache="process"))

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache.os, "preadv", broken)
    with pytest.raises(OSError, match="Input/output error"):
        epoch(loader)


def test_the_cache_follows_from_memory_and_is_said(photos_in_files, monkeypatch, caplog):
    _, prepared = photos_in_files
    size = prepared.splits["train"].bytes
    for free, expected, words in [(2 * size, "os", "fit into"), (size, "process", "do not fit into")]:
        monkeypatch.setattr("pipelines.loaders.cache.available_memory", lambda free=free: free)
        with caplog.at_level("INFO"):
            assert decide_cache(prepared, "train", LoaderConfig()).cache == expected
        assert words in caplog.text
        assert f"cache {expected!r}" in caplog.text
        caplog.clear()
    assert decide_cache(prepared, "train", LoaderConfig(cache="os")).cache == "os"


V2 = {
    "/proc/self/cgroup": ["0::/job/step"],
    "/sys/fs/cgroup/job/step/memory.max": ["max"],
    "/sys/fs/cgroup/job/step/memory.current": ["1"],
    "/sys/fs/cgroup/job/memory.max": ["1000000"],
    "/sys/fs/cgroup/job/memory.current": ["800000"],
    "/sys/fs/cgroup/job/memory.stat": ["anon 5", "inactive_file 100000", "active_file 200000", "slab_reclaimable 7"],
}
V1 = {
    "/proc/self/cgroup": ["9:cpu,cpuacct:/x", "4:memory:/box"],
    "/sys/fs/cgroup/memory/box/memory.limit_in_bytes": ["1000000"],
    "/sys/fs/cgroup/memory/box/memory.usage_in_bytes": ["800000"],
    "/sys/fs/cgroup/memory/box/memory.stat": ["inactive_file 1", "total_inactive_file 300000", "total_active_file 7"],
}


@pytest.mark.parametrize("files", [V1, V2], ids=["v1", "v2"])
def test_available_memory_is_what_the_control_groups_leave(monkeypatch, files):
    original = cache._lines
    assert 1 << 26 < cache.available_memory() < 1 << 50
    assert fits_into_memory(1000)
    assert not fits_into_memory(1 << 50)
    real = {"/proc/meminfo": original(cache.Path("/proc/meminfo"))}
    monkeypatch.setattr(cache, "_lines", lambda path: (files | real).get(str(path), []))
    assert cache.available_memory() == 1_000_000 - 800_000 + 300_007


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", ["os", "process"])
def test_each_worker_reads_its_own_files(photos_in_files, kind, store):
    data, prepared = photos_in_files
    config = LoaderConfig(kind=kind, part="shards", cache=store, workers=1)
    seen, counts = [], []
    for worker in range(2):
        loader = make_loader(prepared, "train", train_plan(data, 5, 0, Share(worker, 2)), config)
        own = epoch(loader, 1)
        assert rows(own[1:]) == rows(epoch(loader, 1, start=1))
        firsts = np.cumsum([0, *(shard.samples for shard in prepared.splits["train"].shards)])
        numbers = np.searchsorted(firsts, rows(own), side="right") - 1
        assert set((numbers % 2).tolist()) == {worker}
        assert prepared.beton("train").labels[rows(own)].tolist() == torch.cat([b.labels for b in own]).tolist()
        seen.append(rows(own))
        counts.append(len(own))
        assert loader.batches == len(own)
        assert {len(batch.labels) for batch in own} == {2 + worker}
    assert counts[0] == counts[1]  # every worker takes as many steps
    assert not set(seen[0]) & set(seen[1])


@needs_ffcv
def test_a_worker_needs_no_other_files(photos_in_files, tmp_path):
    """As on a node that holds only its part."""
    data, prepared = photos_in_files
    plan = train_plan(data, 4, 0, Share(1, 2))
    config = LoaderConfig(kind="ffcv", part="shards")
    expected = rows(epoch(make_loader(prepared, "train", plan, config)))
    away = prepared.paths("train")[0]
    away.rename(tmp_path / away.name)
    try:
        assert rows(epoch(make_loader(prepared, "train", plan, config))) == expected
        with pytest.raises(UserError, match=r"train-00000\.beton' cannot be read"):
            make_loader(prepared, "train", train_plan(data, 4, 0, Share(0, 2)), config)
    finally:
        (tmp_path / away.name).rename(away)


def test_draws_of_workers_with_their_own_files_differ(photos_in_files):
    from pipelines.loaders.make import _own_files

    _, prepared = photos_in_files
    readings: list[ReadPlan] = []
    for worker in range(2):
        _, plan = _own_files(prepared, "train", train_plan(photos_in_files[0], 4, 0, Share(worker, 2)))
        readings.append(plan)
    assert readings[0].seed != readings[1].seed


def test_fewer_files_than_workers(photos_in_files):
    data, prepared = photos_in_files
    with pytest.raises(UserError, match=r"files for 50 workers; set data\.store\.shard_mb lower, or loader\.part: all"):
        make_loader(prepared, "train", train_plan(data, 50, 0, Share(0, 50)), LoaderConfig(part="shards"))


def test_workers_that_would_not_fit_are_told(photos_in_files, monkeypatch):
    data, prepared = photos_in_files
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("pipelines.loaders.make.available_memory", lambda: 10 << 30)
    config = LoaderConfig(kind="torch", cache="process")
    with pytest.raises(
        UserError, match=r"read_ahead_mb 1024 takes 17\.2 GB for 8 workers, of 10\.7 GB that are free; lower it"
    ):
        make_loader(prepared, "train", train_plan(data, 4, 0), config)


@needs_ffcv
def test_a_file_cut_short_while_it_is_read_is_told(photos_in_files, monkeypatch):
    data, prepared = photos_in_files
    loader = make_loader(prepared, "train", train_plan(data, 2, 0), LoaderConfig(kind="ffcv", cache="process"))
    original = cache.os.preadv
    monkeypatch.setattr(cache.os, "preadv", lambda file, buffers, at: original(file, buffers, at) if at % PAGE == 1 else 0)
    with pytest.raises(OSError, match="ends before its images do"):
        epoch(loader)
