"""Images held in memory give the batches that every other loader gives."""

from dataclasses import replace

import pytest
import torch

from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import Batch, Share, train_plan
from pipelines.loaders.resident_loader import ResidentLoader, _Pixels, why_not_resident
from pipelines.prepare.build import ensure_prepared
from tests.conftest import data_config, digits_config

RESIDENT, TORCH = LoaderConfig(kind="resident"), LoaderConfig(kind="torch", workers=1)


def epoch(loader, number=0, start=0) -> list[Batch]:
    return [Batch(b.views.clone(), b.labels.clone(), b.index.clone()) for b in loader.epoch(number, start)]


def same(first, second) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(getattr(a, part), getattr(b, part)) for a, b in pairs for part in ("views", "labels", "index"))


@pytest.mark.parametrize("sampling", ["instance", "square_root", "class_balanced"])
@pytest.mark.parametrize("share", [Share(), Share(1, 3)])
def test_batches_are_those_of_the_other_loaders(digits, tmp_path, sampling, share):
    plan = replace(train_plan(digits_config(tmp_path), 50, 7, share), sampling=sampling)
    resident, plain = (make_loader(digits, "train", plan, config) for config in (RESIDENT, TORCH))
    assert resident.batches == plain.batches
    for number in (0, 3):
        assert same(epoch(resident, number), epoch(plain, number))
    assert same(epoch(resident, 3)[2:], epoch(resident, 3, start=2))


@pytest.fixture(scope="module")
def squares(photo_folder, tmp_path_factory):
    def config(cut):
        return data_config(
            source={"kind": "folder", "path": str(photo_folder)},
            prepared=str(tmp_path_factory.getbasetemp() / "squares"),
            store={"mode": "raw", "square": 80},
            size=64,
            views=[{"cut": cut}, {"cut": {"kind": "crop", "padding": 3}}],
        )

    return config


@pytest.mark.parametrize("cut", [{"kind": "resized", "scale": [0.08, 1.0]}, {"kind": "center", "ratio": 0.9}])
def test_resized_views_are_torchvisions_but_for_rounding(squares, cut):
    data = squares(cut)
    prepared = ensure_prepared(data, 0)
    plan = train_plan(data, 6, 1)
    for config in (RESIDENT, TORCH):
        assert make_loader(prepared, "train", plan, config).batches == 4
    loaders = [make_loader(prepared, "train", plan, config) for config in (RESIDENT, TORCH)]
    for number in range(3):
        for a, b in zip(*(epoch(loader, number) for loader in loaders), strict=True):
            difference = (a.views.float() - b.views.float()).abs()
            assert difference[:, 0].max() <= 2
            assert difference[:, 0].mean() < 0.6
            assert torch.equal(a.views[:, 1], b.views[:, 1])  # copied


def test_two_streams_share_the_images(digits, tmp_path):
    plan = train_plan(digits_config(tmp_path), 50, 0)
    first = ResidentLoader(digits.beton("train"), plan, torch.device("cpu"))
    second = ResidentLoader(digits.beton("train"), replace(plan, sampling="class_balanced"), torch.device("cpu"))
    assert first._pixels is second._pixels
    del first, second
    assert not any(path in digits.beton("train").paths for key in _Pixels._held for path, _ in key[0])


def test_what_cannot_be_held_is_explained(photo_folder, tmp_path, digits, monkeypatch):
    photos = {"source": {"kind": "folder", "path": str(photo_folder)}, "size": 64, "views": [{"cut": {"kind": "resized"}}]}
    for store, message in [({}, "stored as JPEG"), ({"mode": "raw"}, "have different sizes")]:
        data = data_config(**photos, prepared=str(tmp_path), store=store)
        prepared = ensure_prepared(data, 0)
        with pytest.raises(UserError, match=f"loader.kind is 'resident', but .*{message}.*; or set loader.kind: auto"):
            make_loader(prepared, "train", train_plan(data, 4, 0), RESIDENT)
    monkeypatch.setattr("pipelines.loaders.resident_loader.available_memory", lambda: 1000)
    assert why_not_resident(digits.beton("train"), torch.device("cpu")) == "they take 0.0 GB, and cpu has 0.0 GB free"


def test_auto_holds_the_images_where_ffcv_is_absent(digits, tmp_path, monkeypatch):
    plan = train_plan(digits_config(tmp_path), 50, 0)
    monkeypatch.setattr("pipelines.loaders.make.importlib.util.find_spec", lambda name: None)
    assert make_loader(digits, "train", plan, LoaderConfig()).name.startswith("resident loader")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(digits, tmp_path):
    plan = train_plan(digits_config(tmp_path), 50, 7)
    device = torch.device("cuda")
    held = make_loader(digits, "train", plan, LoaderConfig(), device)
    assert held.name.startswith("resident loader")
    plain = epoch(make_loader(digits, "train", plan, TORCH), 2)
    for a, b in zip(epoch(held, 2), plain, strict=True):
        assert a.views.is_cuda
        assert torch.equal(a.views.cpu(), b.views)
        assert torch.equal(a.labels.cpu(), b.labels)
