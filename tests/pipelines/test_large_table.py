"""A table of 100,000 small JPEG files: every row arrives, and memory does not grow with the images."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.pixels import decode, to_rgb
from pipelines.prepare.prepared import Prepared, read_sidecar
from pipelines.prepare.writer import read_lines

ROWS, PICTURES, CLASSES = 100_000, 300, 7
CHILD = """
import re, sys
from pathlib import Path
from pipelines.prepare.build import ensure_prepared
from tests.conftest import data_config
path, folder = sys.argv[1:]
source = {"kind": "table", "path": path}
print(ensure_prepared(data_config(source=source, prepared=folder, store={"shard_mb": 32}), 0).folder)
print(int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) << 10)
"""


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Noise of 40x40 as JPEG files of 3 kB."""
    files, random = [], np.random.default_rng(0)
    for _ in range(PICTURES):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def jpeg(pictures: list[bytes], row: int) -> bytes:
    """The file of a row: no two are the same, by a comment with the row's number."""
    file = pictures[row % PICTURES]
    return file[:2] + b"\xff\xfe\x00\x06" + row.to_bytes(4, "big") + file[2:]


def write_table(path: Path, pictures: list[bytes], rows: int) -> int:
    """Write the rows as one row group, as pyarrow does by default. Returns the bytes of all images."""
    files = [jpeg(pictures, row) for row in range(rows)]
    splits = ["test" if row % 10 == 9 else "train" for row in range(rows)]
    table = pa.table({"image": files, "label": np.arange(rows) % CLASSES, "split": splits})
    pa.parquet.write_table(table, path)
    return sum(map(len, files))


def prepare(path: Path, folder: Path) -> tuple[Prepared, int]:
    """Prepare a table in a process of its own. Returns its most resident memory, too."""
    run = subprocess.run([sys.executable, "-c", CHILD, path, folder], capture_output=True, text=True, check=True)
    place, peak = run.stdout.split("\n")[:2]
    prepared = read_sidecar(Path(place))
    assert prepared is not None
    return prepared, int(peak)


@pytest.mark.slow
def test_a_table_of_100_000_small_jpegs(pictures, tmp_path):
    write_table(tmp_path / "few.parquet", pictures, ROWS // 10)
    _, few = prepare(tmp_path / "few.parquet", tmp_path / "few")
    size = write_table(tmp_path / "all.parquet", pictures, ROWS)
    prepared, peak = prepare(tmp_path / "all.parquet", tmp_path / "all")
    print(f"{size / 1e6:.0f} MB of images; {few / 1e6:.0f} MB of memory for a tenth of them, {peak / 1e6:.0f} MB for all")
    assert peak - few < size / 4
    rows = []
    for split, count in (("train", ROWS - ROWS // 10), ("test", ROWS // 10)):
        names, beton = read_lines(prepared.folder / f"{split}.files.txt"), prepared.beton(split)
        numbers = np.array([int(name.rpartition("/")[2]) - 1 for name in names])
        assert len(beton) == len(numbers) == prepared.splits[split].samples == count
        assert len(prepared.splits[split].shards) > 1
        assert np.array_equal(beton.labels, numbers % CLASSES)
        rows += numbers.tolist()
        for place in range(0, count, count // 100):
            stored = beton.image(place)
            pixels = np.asarray(to_rgb(decode(stored.tobytes()))) if stored.ndim == 1 else stored
            expected = np.asarray(to_rgb(decode(pictures[numbers[place] % PICTURES])))
            assert np.array_equal(pixels, expected)
    assert sorted(rows) == [*range(ROWS)]
