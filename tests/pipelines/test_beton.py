"""Our .beton files are FFCV's, whole or not there at all."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.pixels import stored_size
from pipelines.prepare.beton import ALLOCATION, PAGE, Beton, BetonWriter
from pipelines.prepare.images import Packed
from tests.conftest import REPOSITORY, needs_ffcv


def raw(pixels: np.ndarray) -> Packed:
    return Packed(False, pixels.shape[1], pixels.shape[0], pixels.tobytes())


@pytest.fixture
def images() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shapes = [(4, 5, 3), (1500, 1200, 3), (1400, 1300, 3), (7, 3, 3)]  # the second and third do not fit into one page
    return [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


@pytest.fixture
def path(tmp_path, images):
    path = tmp_path / "a.beton"
    with BetonWriter(path, capacity=9) as writer:
        for label, image in enumerate(images):
            writer.append(raw(image), label)
        writer.finish()
    return path


def test_round_trip(path, images):
    beton = Beton(path)
    assert beton.labels.tolist() == [0, 1, 2, 3]
    for row, image in enumerate(images):
        assert (beton.image(row) == image).all()
    start = beton.starts
    assert (start // PAGE == (start + [i.size - 1 for i in images]) // PAGE).all()


@needs_ffcv
def test_ffcv_reads_it(path, images):
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    reader = Reader(str(path))
    assert reader.num_samples == 4
    assert reader.field_names == ["image", "label"]
    assert reader.metadata["f0"]["height"].tolist() == [4, 1500, 1400, 7]
    pipelines = {"image": None, "label": [IntDecoder()]}
    loader = Loader(str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    ((labels,),) = list(loader)
    assert np.asarray(labels).ravel().tolist() == [0, 1, 2, 3]
    memory = np.fromfile(path, np.uint8)
    for row, image in enumerate(images):
        ptr = reader.alloc_table["ptr"][row]
        assert (memory[ptr : ptr + reader.alloc_table["size"][row]] == image.ravel()).all()


@pytest.mark.parametrize("cut", [ALLOCATION.itemsize, 10_000_000, -2000, 20])
def test_truncated(path, cut):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - cut if cut > 0 else -cut)
    with pytest.raises(UserError, match=r"a\.beton' is (cut short|not a \.beton)"):
        Beton(path)


def test_foreign(tmp_path):
    path = tmp_path / "b.beton"
    path.write_bytes(b"no" * 5000)
    with pytest.raises(UserError, match=r"is not a \.beton file"):
        Beton(path)
    with pytest.raises(UserError, match="cannot be read"):
        Beton(tmp_path / "c.beton")


def test_files_are_open_as_long_as_they_are_used(path, images):
    def descriptors() -> int:
        return len([*Path("/proc/self/fd").iterdir()])

    before = descriptors()
    beton = Beton(path)
    path.unlink()
    image = beton.image(1)
    assert descriptors() > before
    del beton
    assert (image == images[1]).all()
    del image
    assert descriptors() == before


def test_too_many_open_files(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(UserError, match=r"Too many open files; raise the limit \(ulimit -n\)"):
            Beton(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_failed_writer_leaves_nothing(tmp_path, images):
    with pytest.raises(RuntimeError), BetonWriter(tmp_path / "a.beton", 2) as writer:
        writer.append(raw(images[0]), 0)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(2000, 1500), (1800, 1800), (3, 60000), (60000, 47), (1673, 1672), (4001, 2500)])
def test_an_image_larger_than_a_page_fits_with_what_is_advised(tmp_path, size):
    with BetonWriter(tmp_path / "a.beton", 3) as writer:
        if size[0] * size[1] * 3 > PAGE:
            with pytest.raises(UserError, match=r"bytes, 8,388,608 at most; set data\.store\.max_side to") as caught:
                writer.append(Packed(False, *size, bytes(size[0] * size[1] * 3)), 0)
            side, every = map(int, re.findall(r" (\d+)\b(?! bytes| at)", str(caught.value).partition("max_side")[2]))
            assert every == 1672 <= side
        else:
            side = max(size)
        fits = stored_size(*size, None, side)
        writer.append(Packed(False, *fits, bytes(fits[0] * fits[1] * 3)), 0)
        above = stored_size(*size, None, side + 3)
        assert above[0] * above[1] * 3 > PAGE or above == size or min(size) < 100  # where a row more or less matters
        writer.append(Packed(False, 1672, 1672, bytes(1672 * 1672 * 3)), 0)
    with (
        BetonWriter(tmp_path / "b.beton", 1) as writer,
        pytest.raises(UserError, match="lower .*max_side or data.store.quality"),
    ):
        writer.append(Packed(True, 3000, 3000, bytes(PAGE + 1)), 0)


def test_an_image_longer_than_the_format_can_tell_is_refused(tmp_path):
    with BetonWriter(tmp_path / "a.beton", 1) as writer, pytest.raises(UserError, match=r"70000x2 .*set data\.store\.max_side"):
        writer.append(raw(np.zeros((2, 70000, 3), np.uint8)), 0)


def test_a_full_disk_leaves_nothing(tmp_path):
    """Under a limit on the size of files, as a full disk: the error comes through, the part is gone."""
    code = f"""
import resource, numpy as np
from pathlib import Path
from pipelines.prepare.beton import BetonWriter, PAGE
from pipelines.prepare.images import Packed
resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE + 5000, PAGE + 5000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with BetonWriter(Path({str(tmp_path)!r}) / "a.beton", 9) as writer:
    for label in range(9):
        writer.append(Packed(False, 32, 32, bytes(3072)), label)
    writer.finish()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []
