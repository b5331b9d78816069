"""Every command of the page on sources of images runs, on images of each kind."""

from __future__ import annotations

import csv
import re
import shlex
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.prepare.__main__ import main
from pipelines.prepare.sources import FolderSource
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "how-to" / "data.md").read_text()
COMMANDS = re.findall(r"^python -m pipelines\.prepare (.*)$", PAGE, re.MULTILINE)


@pytest.fixture
def everything(image_folder, tmp_path, monkeypatch):
    """A working folder with the same images as a folder, a zip, tables, shards, a data set and a list."""
    datasets = pytest.importorskip("datasets")
    webdataset = pytest.importorskip("webdataset")
    import pyarrow as pa
    import pyarrow.parquet

    place = tmp_path / "work"
    place.mkdir()
    image_folder.rename(place / "photos")
    dataset = FolderSource(kind="folder", path=place / "photos").open()
    train = dataset.train
    names = [dataset.classes[label] for label in train.labels]
    files = [train.read(index) for index in range(len(train))]
    with zipfile.ZipFile(place / "photos.zip", "w") as archive:
        for name, data in zip(train.names, files, strict=True):
            archive.writestr(name, data)
    with (place / "photos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "class", "patient"])
        writer.writerows([f"photos/{path}", names[row], row % 5] for row, path in enumerate(train.names))
    pa.parquet.write_table(pa.table({"image": files, "species": names, "id": np.arange(len(names))}), place / "photos.parquet")
    (place / "shards").mkdir()
    with webdataset.ShardWriter(str(place / "shards" / "train-%03d.tar"), maxcount=10, verbose=0) as shards:
        for row, data in enumerate(files):
            shards.write({"__key__": f"{row:05d}", "png": data, "cls": int(train.labels[row])})
    cells = [{"bytes": data, "path": None} for data in files]
    table = datasets.Dataset.from_dict({"image": cells, "label": names}).cast_column("image", datasets.Image())
    table.save_to_disk(str(place / "trees"))
    lines = (f"{path} {label}\n" for path, label in zip(train.names, train.labels, strict=True))
    (place / "train.txt").write_text("".join(lines))
    monkeypatch.chdir(place)
    assert dataset.test is not None
    return len(train), len(dataset.test)


def test_the_page_has_a_command_for_each_kind():
    kinds = {match[1] for command in COMMANDS if (match := re.search(r"--data\.source\.kind (\w+)", command))}
    assert kinds == {"archive", "table", "webdataset", "huggingface", "lists"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(everything, command, monkeypatch, capsys, request):
    if "s3://trees" in command:
        bucket = request.getfixturevalue("bucket")
        storage = pytest.importorskip("fsspec").filesystem("s3")
        for path in (*Path("photos").rglob("*.png"), *Path("shards").glob("*.tar")):
            storage.pipe_file(f"{bucket}/{path}", path.read_bytes())
    monkeypatch.setattr(sys, "argv", ["prepare", *shlex.split(command.replace("FOLDER", "photos"))])
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    main()
    shown = capsys.readouterr().out
    counts = [int(count) for count in re.findall(r"^(?:train|val|test): ([0-9]+) images, 3 classes", shown, re.MULTILINE)]
    own_test = everything[1] if "source.kind" not in command else 0  # the other kinds were given the training images alone
    assert sum(counts) == everything[0] + own_test
    assert len(counts) > 1
