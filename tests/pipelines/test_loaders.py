"""Both loaders give the same batches, that follow the seed and the epoch; errors surface."""

import gc
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders import torch_loader
from pipelines.loaders.cuts import FLIP, HEIGHT, LEFT, TOP, WIDTH, draw_cuts, epoch_order
from pipelines.loaders.make import loader_kind, make_loader
from pipelines.loaders.reading import Batch, ReadPlan, eval_plan, train_plan
from pipelines.prepare.build import ensure_prepared
from tests.conftest import REPOSITORY, data_config, digits_config, needs_ffcv

KINDS = [pytest.param("ffcv", marks=needs_ffcv), "torch"]


def batches(loader, epoch, start=0) -> list[Batch]:
    """Copies: a batch's tensors are the loader's own buffers."""
    return [Batch(b.views.clone(), b.labels.clone(), b.index.clone()) for b in loader.epoch(epoch, start)]


def same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(getattr(a, part), getattr(b, part)) for a, b in pairs for part in ("views", "labels", "index"))


def plan(tmp_path, seed=0, batch_size=64, **more) -> ReadPlan:
    return train_plan(digits_config(tmp_path, **more), batch_size, seed)


@pytest.fixture(scope="module")
def photos_prepared(photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    data = data_config(
        source={"kind": "folder", "path": str(photo_folder)},
        prepared=str(folder),
        size=96,
        views=[{"cut": {"kind": "resized"}}] * 3,
        eval_cut={"kind": "center", "ratio": 0.875},
    )
    return data, ensure_prepared(data, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_batches(digits, tmp_path, kind):
    loader = make_loader(digits, "train", plan(tmp_path), LoaderConfig(kind=kind))
    seen = batches(loader, 0)
    assert len(seen) == loader.batches == 398 // 64
    assert {tuple(batch.views.shape) for batch in seen} == {(64, 2, 16, 16, 3)}
    rows = torch.cat([batch.index for batch in seen])
    assert len(rows.unique()) == len(rows)
    labels = digits.beton("train").labels
    assert (labels[rows.numpy()] == torch.cat([batch.labels for batch in seen]).numpy()).all()


@needs_ffcv
def test_both_loaders_agree_to_the_bit_where_nothing_is_resized(digits, tmp_path):
    of = plan(tmp_path, seed=3)
    ffcv, plain = (make_loader(digits, "train", of, LoaderConfig(kind=kind)) for kind in ("ffcv", "torch"))
    for epoch in (0, 5):
        assert same(batches(ffcv, epoch), batches(plain, epoch))


@needs_ffcv
def test_both_loaders_cut_alike_where_jpegs_are_resized(photos_prepared):
    """Same boxes, flips and order; pixels differ by rounding and by where chroma is upsampled."""
    data, prepared = photos_prepared
    of = train_plan(data, 8, seed=1)
    ffcv, plain = (make_loader(prepared, "train", of, LoaderConfig(kind=kind, workers=2)) for kind in ("ffcv", "torch"))
    for a, b in zip(batches(ffcv, 2), batches(plain, 2), strict=True):
        assert torch.equal(a.index, b.index)
        difference = (a.views.float() - b.views.float()).abs().mean(dim=(2, 3, 4))
        assert difference.max() < 2
        assert difference.mean() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_repeats_and_resumes_exactly(digits, tmp_path, kind):
    first, second = (make_loader(digits, "train", plan(tmp_path), LoaderConfig(kind=kind)) for _ in range(2))
    whole = batches(first, 4)
    assert same(whole, batches(second, 4))  # straight to epoch 4
    assert same(whole[2:], batches(second, 4, start=2))
    assert not same(whole, batches(first, 5))
    other = make_loader(digits, "train", plan(tmp_path, seed=1), LoaderConfig(kind=kind))
    assert not same(whole, batches(other, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_a_sample_are_drawn_independently(digits, tmp_path, kind):
    loader = make_loader(digits, "train", plan(tmp_path), LoaderConfig(kind=kind))
    views = torch.cat([batch.views for batch in batches(loader, 0)])
    alike = (views[:, 0] == views[:, 1]).flatten(1).all(1).float().mean()
    assert alike < 0.05  # 9 x 9 places and a flip: about 1 in 160, more where a margin is empty


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_takes_every_sample_once_untouched(digits, tmp_path, kind):
    loader = make_loader(digits, "test", eval_plan(digits_config(tmp_path), 100), LoaderConfig(kind=kind))
    seen = batches(loader, 0)
    assert [len(batch.labels) for batch in seen] == [100, 100, 100, 100, 45]
    assert torch.cat([batch.index for batch in seen]).tolist() == list(range(445))
    beton = digits.beton("test")
    for row, view in enumerate(torch.cat([batch.views for batch in seen])[:, 0]):
        assert (view.numpy() == beton.image(row)).all()


@needs_ffcv
def test_ffcv_cuts_what_torchvision_cuts(digits, tmp_path):
    of = plan(tmp_path)
    batch = batches(make_loader(digits, "train", of, LoaderConfig(kind="ffcv")), 7)[0]
    beton = digits.beton("train")
    order = epoch_order(beton.labels, "instance", of.seed, 7)
    sides = np.full(len(beton), 16)
    cuts = draw_cuts(of.views, of.size, sides, sides, of.seed, 7)
    assert {-4, 4} <= set(cuts[:, 0, TOP].tolist())
    for position in range(64):
        image = torch.from_numpy(beton.image(int(order[position])).copy()).permute(2, 0, 1)
        for view in range(2):
            top, left, height, width, flip = cuts[position, view].tolist()
            expected = tv.crop(image, top, left, height, width)
            expected = tv.horizontal_flip(expected) if flip else expected
            assert torch.equal(batch.views[position, view].permute(2, 0, 1), expected)


def test_resized_cuts_have_torchvisions_distribution():
    data = data_config(views=[{"cut": {"kind": "resized", "scale": [0.2, 0.9]}, "flip": 0.3}], size=224)
    heights, widths = np.full(20_000, 300), np.full(20_000, 400)
    cuts = draw_cuts(data.views, 224, heights, widths, seed=0, epoch=0)[:, 0]
    area = cuts[:, HEIGHT] * cuts[:, WIDTH] / (300 * 400)
    ratio = cuts[:, WIDTH] / cuts[:, HEIGHT]
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    drawn = [v2.RandomResizedCrop(224, scale=(0.2, 0.9)).make_params([image]) for _ in range(5_000)]
    their_area = np.array([box["height"] * box["width"] for box in drawn]) / (300 * 400)
    their_ratio = np.array([box["width"] / box["height"] for box in drawn])
    for quantile in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert abs(np.quantile(area, quantile) - np.quantile(their_area, quantile)) < 0.02
        assert abs(np.quantile(ratio, quantile) - np.quantile(their_ratio, quantile)) < 0.02
    assert (cuts[:, TOP] >= 0).all()
    assert (cuts[:, TOP] + cuts[:, HEIGHT] <= 300).all()
    assert (cuts[:, LEFT] + cuts[:, WIDTH] <= 400).all()
    assert abs(cuts[:, FLIP].mean() - 0.3) < 0.02


def test_extreme_images_fall_back_to_a_centre_box():
    data = data_config(views=[{"cut": {"kind": "resized", "scale": [0.9, 1]}}], size=32)
    top, left, height, width, _ = draw_cuts(data.views, 32, np.array([10]), np.array([1000]), 0, 0)[0, 0].tolist()
    assert (top, left, height, width) == (0, 493, 10, 13)


def test_an_image_twice_in_an_epoch_is_cut_twice():
    data = data_config()
    cuts = draw_cuts(data.views, 32, np.full(50, 32), np.full(50, 32), 0, 0)
    assert len(np.unique(cuts.reshape(50, -1), axis=0)) > 45


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_smaller_than_the_crop_is_explained(digits, tmp_path, kind):
    of = replace(plan(tmp_path), size=64)
    with pytest.raises(UserError, match=r"16x16 with padding 4 is smaller than the crop of 64x64"):
        batches(make_loader(digits, "train", of, LoaderConfig(kind=kind)), 0)


def test_fewer_images_than_a_batch(digits, tmp_path):
    with pytest.raises(UserError, match=r"398 images, fewer than one batch of 512; lower train\.batch_size"):
        make_loader(digits, "train", plan(tmp_path, batch_size=512), LoaderConfig())


@needs_ffcv
@pytest.mark.timeout(60)
def test_an_exception_in_ffcvs_thread_surfaces(digits, tmp_path, monkeypatch):
    loader = make_loader(digits, "train", plan(tmp_path), LoaderConfig(kind="ffcv"))

    def fail(self, number, *rest):
        if number == 3:
            raise MemoryError("planted")
        return original(self, number, *rest)

    original = loader_epoch().run_pipeline
    monkeypatch.setattr(loader_epoch(), "run_pipeline", fail)
    taken = 0
    with pytest.raises(RuntimeError, match="the FFCV pipeline stopped: planted"):
        for _ in loader.epoch(0):
            taken += 1
    assert taken == 3


def loader_epoch():
    from pipelines.loaders.ffcv_loader import _Epoch

    return _Epoch


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "workers"), [*[pytest.param("ffcv", n, marks=needs_ffcv) for n in (1, 2)], ("torch", 1)])
def test_a_damaged_jpeg_in_the_file_surfaces(photos_prepared, tmp_path, kind, workers):
    data = photos_prepared[0].model_copy(update={"prepared": tmp_path})
    prepared = ensure_prepared(data, 0)
    start = int(prepared.beton("train").starts[5])
    with prepared.paths("train")[0].open("r+b") as file:
        file.seek(start)
        file.write(b"\0" * 64)
    loader = make_loader(prepared, "train", train_plan(data, 8, 0), LoaderConfig(kind=kind, workers=workers))
    with pytest.raises(UserError, match=r"image 5 of .*train\.beton.* \(line 6 of train\.files\.txt\) is damaged"):
        batches(loader, 0)


@needs_ffcv
def test_a_jpeg_with_stray_bytes_is_read_as_pillow_reads_it(photo_folder, tmp_path):
    """turbojpeg takes warnings for errors; Pillow, and so the writer and the torch loader, reads on."""
    from ffcv.libffcv import imdecode

    shutil.copytree(photo_folder, tmp_path / "photos")
    random = np.random.default_rng(0)
    for file in sorted((tmp_path / "photos" / "train").rglob("*.jpg")):
        data = bytearray(file.read_bytes())
        data[random.integers(len(data) // 2, len(data) - 10)] ^= 0x55
        file.write_bytes(data)
    source = {"kind": "folder", "path": str(tmp_path / "photos")}
    views = [{"cut": {"kind": "crop", "padding": 0}}]
    data = data_config(source=source, prepared=str(tmp_path / "p"), size=120, views=views, on_bad_image="skip")
    prepared = ensure_prepared(data, 0)
    beton = prepared.beton("train")
    refused = 0
    for row in range(len(beton)):
        height, width = np.uint32(beton.heights[row]), np.uint32(beton.widths[row])
        image = np.empty((height, width, 3), np.uint8)
        jpeg = np.ascontiguousarray(beton.image(row))
        refused += imdecode(jpeg, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0
    assert refused > 0
    of = train_plan(data, 8, 0)
    ffcv, plain = (batches(make_loader(prepared, "train", of, LoaderConfig(kind=kind)), 0) for kind in ("ffcv", "torch"))
    for a, b in zip(ffcv, plain, strict=True):
        assert (a.views.float() - b.views.float()).abs().mean(dim=(2, 3, 4)).max() < 2.0


@needs_ffcv
@pytest.mark.timeout(60)
def test_a_second_epoch_at_once_is_refused_not_hung(digits, tmp_path):
    loader = make_loader(digits, "train", plan(tmp_path), LoaderConfig(kind="ffcv"))
    first = loader.epoch(0)
    next(first)
    next(loader.epoch(1))
    with pytest.raises(RuntimeError, match="one epoch at a time"):
        next(first)


@needs_ffcv
@pytest.mark.timeout(60)
def test_two_loaders_at_once_and_torchs_threads_stay(photos_prepared):
    data, prepared = photos_prepared
    threads = torch.get_num_threads()
    train = make_loader(prepared, "train", train_plan(data, 8, 0), LoaderConfig(kind="ffcv", workers=2))
    test = make_loader(prepared, "test", eval_plan(data, 2), LoaderConfig(kind="ffcv", workers=2))
    seen = 0
    for _ in train.epoch(0):
        seen += sum(len(batch.labels) for batch in test.epoch(0))
    assert seen == 3 * 5
    assert torch.get_num_threads() == threads


@needs_ffcv
def test_leaving_an_epoch_ends_its_thread(digits, tmp_path):
    loader = make_loader(digits, "train", plan(tmp_path), LoaderConfig(kind="ffcv"))
    before = threading.active_count()
    epoch = loader.epoch(0)
    next(epoch)
    assert threading.active_count() == before + 1
    loader.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_auto_takes_ffcv_where_it_is_and_torch_elsewhere(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert loader_kind(LoaderConfig()) == "ffcv"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert loader_kind(LoaderConfig()) == "torch"
    with pytest.raises(UserError, match="FFCV is not installed"):
        loader_kind(LoaderConfig(kind="ffcv"))


def test_evaluation_needs_no_ffcv(digits, tmp_path, monkeypatch):
    """A run that was trained with it is evaluated and exported where it is not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "ffcv" else find_spec(name, *more))
    config = LoaderConfig(kind="ffcv")
    loader = make_loader(digits, "test", eval_plan(digits_config(tmp_path), 100), config)
    assert sum(len(batch.labels) for batch in loader.epoch(0)) == loader.samples
    with pytest.raises(UserError, match="FFCV is not installed"):
        make_loader(digits, "train", plan(tmp_path), config)


def test_the_log_says_which_loader_runs(digits, tmp_path, caplog):
    with caplog.at_level("INFO"):
        make_loader(digits, "train", plan(tmp_path), LoaderConfig(kind="torch"))
    assert "train: 398 images, torchvision loader" in caplog.text


class _Client:
    """Garbage that must end in the process that made it: Ray's has threads, which no forked process has."""

    def __init__(self) -> None:
        self.itself, self.process = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(11)


def test_a_worker_process_collects_no_garbage_of_its_parent(digits, tmp_path, monkeypatch):
    crop = torch_loader._crop
    monkeypatch.setattr(torch_loader, "_crop", lambda *arguments: (gc.collect(), crop(*arguments))[1])
    loader = make_loader(digits, "train", plan(tmp_path), LoaderConfig(kind="torch", workers=1))
    garbage = _Client()
    held = weakref.ref(garbage)
    gc.disable()
    try:
        del garbage
        next(loader.epoch(0))
        assert held() is not None
    finally:
        gc.enable()
    gc.collect()
    assert held() is None


def test_worker_processes_where_they_are_not_forked_by_default(digits, tmp_path):
    """As with Python 3.14: their open files must be those of this process."""
    configs = LoaderConfig(kind="torch"), LoaderConfig(kind="torch", workers=1)
    alone, workers = (make_loader(digits, "train", plan(tmp_path), config) for config in configs)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert same(batches(workers, 0, start=4), batches(alone, 0, start=4))
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_swapped_file_is_noticed(digits, tmp_path):
    prepared = ensure_prepared(digits_config(tmp_path), 0)
    prepared.paths("test")[0].replace(prepared.paths("train")[0])
    with pytest.raises(UserError, match=r"is not the file that prepared\.json describes"):
        make_loader(prepared, "train", plan(tmp_path), LoaderConfig())


@pytest.mark.parametrize(
    "config",
    [
        *[pytest.param({"kind": "ffcv", "cache": cache}, marks=needs_ffcv) for cache in ("os", "process")],
        {"kind": "torch"},
        {"kind": "torch", "workers": 1},
        {"kind": "resident"},
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_data_prepared_anew_do_not_reach_a_loader_in_use(image_folder, tmp_path, config, begun):
    """Another command of the same configuration, whose images have changed meanwhile, writes in the same folder."""
    data = data_config(
        source={"kind": "folder", "path": str(image_folder)},
        prepared=str(tmp_path / "prepared"),
        size=8,
        views=[{"cut": {"kind": "crop", "padding": 1}}],
    )
    prepared = ensure_prepared(data, 0)
    train, test = train_plan(data, 4, 0), eval_plan(data, 4)
    untouched = [batches(make_loader(prepared, "train", train, LoaderConfig(**config)), epoch) for epoch in (0, 1)]
    scored = batches(make_loader(prepared, "test", test, LoaderConfig(**config)), 0)
    running = make_loader(prepared, "train", train, LoaderConfig(**config))
    held_out = make_loader(prepared, "test", test, LoaderConfig(**config))
    if begun:
        assert same(batches(running, 0), untouched[0])
    for split in ("train", "test"):
        for number in range(3):
            shutil.copy(image_folder / split / "one" / "0.png", image_folder / split / "nought" / f"more{number}.png")
    again = ensure_prepared(data, 0)
    assert again.folder == prepared.folder
    assert len(again.beton("train")) == 22
    assert same(batches(running, 1), untouched[1])
    assert same(batches(held_out, 0), scored)
    with pytest.raises(UserError, match=r"was prepared again while this command ran; run it again"):
        make_loader(prepared, "train", train, LoaderConfig(**config))


@needs_ffcv
@pytest.mark.parametrize("store", ["os", "process"])
def test_memory_stays_flat_over_twenty_epochs(photos_prepared, store):
    import psutil

    data, prepared = photos_prepared
    config = LoaderConfig(kind="ffcv", cache=store, read_ahead_mb=16, workers=2)
    loader = make_loader(prepared, "train", train_plan(data, 8, 0), config)
    process, before = psutil.Process(), threading.active_count()

    def held(first: int, last: int) -> int:
        for number in range(first, last):
            for batch in loader.epoch(number):
                assert len(batch.labels) == 8
            loader.close()
        return process.memory_info().rss

    warm = held(0, 5)
    # An epoch's batches are 2 MiB, its pages 8: one leaked a round would be 40 to 160. The allocator itself grows by up to 12.
    assert held(5, 25) - warm < 24 << 20
    assert threading.active_count() <= before


@needs_ffcv
def test_closing_does_not_decode_the_rest(photos_prepared, monkeypatch):
    from pipelines.loaders import ffcv_loader

    data, prepared = photos_prepared
    loader = make_loader(prepared, "train", train_plan(data, 1, 0), LoaderConfig(kind="ffcv", batches_ahead=1))
    done, original = [], ffcv_loader.cut_batch

    def slow(*arguments):
        done.append(1)
        time.sleep(0.02)
        original(*arguments)

    monkeypatch.setattr(ffcv_loader, "cut_batch", slow)
    epoch = loader.epoch(0)
    next(epoch)
    loader.close()
    assert len(done) < 8  # of 24: what was ahead, no more


@needs_ffcv
def test_a_closed_loader_opens_again(photos_prepared):
    data, prepared = photos_prepared
    loader = make_loader(prepared, "train", train_plan(data, 8, 0), LoaderConfig(kind="ffcv"))
    first = batches(loader, 3)
    loader.close()
    assert same(batches(loader, 3), first)
    left = loader.epoch(4)
    next(left)
    loader.close()
    loader.close()
    assert same(batches(loader, 3), first)


@needs_ffcv
def test_compiled_code_is_kept_between_runs(photos_prepared, tmp_path):
    """The second process finds what the first has compiled, instead of waiting for it again."""
    data, _ = photos_prepared
    code = f"""
import json
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import train_plan
from pipelines.config import DataConfig, LoaderConfig
from pipelines.loaders.cut_kernel import cut_batch
from pipelines.prepare.build import ensure_prepared
data = DataConfig.model_validate(json.loads({data.model_dump_json()!r}))
loader = make_loader(ensure_prepared(data, 0), "train", train_plan(data, 8, 0), LoaderConfig(kind="ffcv"))
assert sum(1 for _ in loader.epoch(0)) == 3
print(sum(cut_batch.stats.cache_hits.values()), sum(cut_batch.stats.cache_misses.values()))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    seen = [
        subprocess.run(run, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert seen == [["0", "1"], ["1", "0"]]
