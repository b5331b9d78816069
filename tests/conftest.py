"""Small real images for every test: scikit-learn's digits and photographs, and bigger sets where they are unpacked."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Several processes share the cores: a thread of OpenMP's that waits for others must sleep, not spin. Read as torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray's workers yield to everything else by default: beside another process of tests they would stand still.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines.common.validation import validate
from pipelines.config import DataConfig
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.prepared import Prepared

REPOSITORY = Path(__file__).resolve().parent.parent
pytest_plugins = ["tests.exported", "tests.hosts.two_hosts", "tests.serve.browsers"]
needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")

# What takes longest begins first, where files are shared out among several processes (`make test`).
LONGEST = ("test_cluster", "test_tune", "test_train", "test_nodes", "test_objective", "test_service", "test_reproduce")


def pytest_configure(config: pytest.Config) -> None:
    """Without the marker `gpu`, what is tested runs where it runs everywhere: on the CPU."""
    # A shell that starts tests in the background has them ignore Ctrl-C; commands under test would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def archive(name: str) -> Path:
    """A development archive of real images; the test skips where it is absent. CIBL_RAY_TEST_DATA names their folder."""
    path = Path(os.environ.get("CIBL_RAY_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / name
    if not path.exists():
        pytest.skip(f"{name} is not here; CIBL_RAY_TEST_DATA names the folder that has it")
    return path


def processes_below(pid: int) -> list[tuple[psutil.Process, str]]:
    """The children of a process, theirs too, each with its command line. Those that end meanwhile are left out."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append((child, " ".join(child.cmdline())))
    return found


def data_config(**content: object) -> DataConfig:
    """A DataConfig of `content`; its images are scikit-learn's digits where `content` names no source."""
    return validate(DataConfig, {"source": {"kind": "digits"}, **content}, "test")


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Two natural photographs of 640x427, as JPEG files."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Long-tailed digits, 16x16, raw: 10 classes, with a validation split."""
    folder = tmp_path_factory.mktemp("digits")
    return ensure_prepared(digits_config(folder), seed=0)


def digits_config(folder: Path, **more: object) -> DataConfig:
    return data_config(
        source={"kind": "digits"},
        profile={"kind": "exp", "imbalance": 20},
        val_fraction=0.1,
        store={"square": 16},
        size=16,
        prepared=str(folder),
        **more,
    )


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train and test of three classes, real digits as PNG files: 8, 6 and 5 training images, 3 test images each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label, name, count in ((0, "nought", 8), (1, "one", 6), (2, "two", 5)):
        pixels = digits.images[digits.target == label]
        for split, images in (("train", pixels[:count]), ("test", pixels[count : count + 3])):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number, image in enumerate(images):
                Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory, photos: list[Path]) -> Path:
    """Crops of two photographs as natural JPEG files of many sizes: two classes, 24 training and 5 test images."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for label, photo in enumerate(photos):
        image = Image.open(photo)
        for split, count in (("train", 12), ("test", 3 - label)):
            folder = root / split / photo.stem
            folder.mkdir(parents=True)
            for number in range(count):
                width, height = random.integers(150, 400), random.integers(150, 400)
                left, top = random.integers(0, 640 - width), random.integers(0, 427 - height)
                box = image.crop((left, top, left + width, top + height))
                box.save(folder / f"{number}.jpg", quality=90)
    return root


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a local S3 server, with credentials in the environment."""
    server_of_moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    s3fs = pytest.importorskip("s3fs")
    server = server_of_moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "hidden-key", "AWS_SECRET_ACCESS_KEY": "hidden-secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="trees")
    yield "s3://trees"
    # moto's buckets belong to the process, not to the server: the next test would find these images.
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def unpacked(name: str, folder: Path, members: int | None = None) -> Path:
    """An archive unpacked in `folder`: all of it, or its first `members` files."""
    with zipfile.ZipFile(archive(name)) as file:
        file.extractall(folder, file.namelist()[:members])
    return folder
