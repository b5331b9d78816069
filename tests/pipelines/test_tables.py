"""Images that are rows of a table: CSV, TSV, JSON lines and Parquet, with paths, addresses and bytes."""

from __future__ import annotations

import csv
import functools
import http.server
import json
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pipelines.common.errors import UserError
from pipelines.config import DataConfig
from pipelines.pixels import decode, to_rgb
from pipelines.prepare import writer
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.sources import TableSource, addresses
from tests.sources import served

COUNTS = {"ash": 8, "birch": 6, "oak": 4}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """PNG files of one colour each, so that an image tells which row it is of. name -> (class, colour)."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for label, (name, count) in enumerate(COUNTS.items()):
        for number in range(count):
            colour = (50 * label + number, 100, 200)
            path = folder / "files" / f"{name}-{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (12, 10), colour).save(path)
            split = "train" if number < count - 2 else "test"
            rows.append(
                {"image": f"files/{path.name}", "label": name, "split": split, "patient": f"p{number % 4}", "red": colour[0]}
            )
    return folder, rows


def write_csv(path: Path, rows: list[dict], columns: list[str], delimiter: str = ",", header: bool = True) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        if header:
            writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in rows)
    return path


def reds(images) -> list[int]:
    """The red value of each image, which says what row it was made of."""
    return [int(np.asarray(to_rgb(decode(images.read(index))))[0, 0, 0]) for index in range(len(images))]


def expected(rows: list[dict], split: str) -> list[int]:
    return [row["red"] for row in rows if row["split"] == split]


def parquet(path: Path, rows: list[dict], struct: bool) -> Path:
    files = [(path.parent / row["image"]).read_bytes() for row in rows]
    cells = [{"bytes": data, "path": None} for data in files] if struct else files
    table = pa.table({"image": cells, "label": [row["label"] for row in rows], "split": [row["split"] for row in rows]})
    pa.parquet.write_table(table, path, row_group_size=5)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet of paths", "parquet of bytes", "parquet of structs"])
def test_each_format_gives_the_same_images(photos, kind, capsys):
    folder, rows = photos
    path = folder / f"{kind.replace(' ', '-')}.{kind.split()[0]}"
    match kind:
        case "csv" | "tsv":
            write_csv(path, rows, ["image", "label", "split"], "," if kind == "csv" else "\t")
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "parquet of paths":
            pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        case _:
            parquet(path, rows, kind.endswith("structs"))
    dataset = TableSource(kind="table", path=path).open()
    assert "columns found by name: image = 'image', label = 'label', split = 'split'" in capsys.readouterr().err
    assert dataset.classes == ["ash", "birch", "oak"]
    assert dataset.val is None
    assert dataset.test is not None
    assert reds(dataset.train) == expected(rows, "train")
    assert reds(dataset.test) == expected(rows, "test")
    assert [dataset.classes[label] for label in dataset.test.labels] == [row["label"] for row in rows if row["split"] == "test"]
    some = dataset.train.take(np.array([3, 1]))
    assert reds(some) == [expected(rows, "train")[3], expected(rows, "train")[1]]
    assert some.digest() != dataset.train.digest() == TableSource(kind="table", path=path).open().train.digest()


@pytest.mark.parametrize("header", [True, False])
def test_a_csv_with_semicolons(photos, header):
    folder, rows = photos
    path = write_csv(folder / "excel.csv", rows, ["image", "label"], delimiter=";", header=header)
    dataset = TableSource(kind="table", path=path).open()
    assert dataset.classes == ["ash", "birch", "oak"]
    assert reds(dataset.train) == [row["red"] for row in rows]


def test_without_a_header_the_cells_tell(photos):
    folder, rows = photos
    path = write_csv(folder / "bare.csv", rows, ["label", "image"], header=False)
    dataset = TableSource(kind="table", path=path).open()
    assert reds(dataset.train) == [row["red"] for row in rows]


@pytest.mark.parametrize(
    ("labels", "classes", "order"),
    [
        (["1", "2", "3"], ["1", "2", "3"], [0, 1, 2]),
        (["10", "9", "100"], ["9", "10", "100"], [1, 0, 2]),
        (["b", "a", "10"], ["10", "a", "b"], [2, 1, 0]),
    ],
)
def test_labels_are_numbers_from_anywhere_or_text(photos, labels, classes, order):
    folder, rows = photos
    names = dict(zip(COUNTS, labels, strict=True))
    path = write_csv(folder / "numbers.csv", [{**row, "label": names[row["label"]]} for row in rows], ["image", "label"])
    dataset = TableSource(kind="table", path=path).open()
    assert dataset.classes == classes
    assert dict(zip(dataset.train.labels.tolist(), [row["label"] for row in rows], strict=True)) == dict(
        zip(order, COUNTS, strict=True)
    )


def test_a_file_of_classes_chooses_orders_and_names(photos, capsys):
    folder, rows = photos
    path = write_csv(folder / "three.csv", rows, ["image", "label"])
    (folder / "classes.txt").write_text("oak\tQuercus\nash\n")
    dataset = TableSource(kind="table", path=path, classes=folder / "classes.txt").open()
    assert dataset.classes == ["Quercus", "ash"]
    assert np.bincount(dataset.train.labels).tolist() == [COUNTS["oak"], COUNTS["ash"]]
    assert f"{COUNTS['birch']} rows are of classes that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, "row 3: the column 'label' is empty"),
        ({"split": "holdout"}, "row 3: the column 'split' is 'holdout'; expected train, val or test: correct the cell"),
        ({"split": ""}, "row 3: the column 'split' is empty; expected train, val or test"),
        ({"image": "files/ash-0.png"}, "row 3: 'files/ash-0.png' stands in row 1 already"),
        ({"image": "https://example.org/a.png"}, "row 3: addresses and paths are mixed"),
    ],
)
def test_mistakes_name_the_row(photos, change, message):
    folder, rows = photos
    path = write_csv(folder / "wrong.csv", [*rows[:2], {**rows[2], **change}, *rows[3:]], ["image", "label", "split"])
    with pytest.raises(UserError, match=message):
        TableSource(kind="table", path=path).open()


def test_a_column_that_only_has_a_splits_name_is_told_and_not_taken(photos, capsys):
    folder, rows = photos
    folds = [{**row, "fold": number % 5} for number, row in enumerate(rows)]
    source = TableSource(kind="table", path=write_csv(folder / "folds.csv", folds, ["image", "label", "fold"]))
    assert source.open().test is None
    assert (
        "label = 'label' (data.source.image and so on); not taken for the split, because no cell says train, val or test: "
        in (told := capsys.readouterr().err)
    )
    assert told.endswith(": 'fold'\n")
    with pytest.raises(UserError, match="row 1: the column 'fold' is '0'; expected train, val or test"):
        source.model_copy(update={"split": "fold"}).open()
    both = TableSource(kind="table", path=write_csv(folder / "both.csv", folds, ["image", "label", "fold", "split"]))
    assert both.open().test is not None
    assert "not taken" not in capsys.readouterr().err


def test_a_column_that_is_not_there_or_not_known(photos):
    folder, rows = photos
    path = write_csv(folder / "odd.csv", rows, ["image", "label", "red"])
    with pytest.raises(UserError, match=r"data.source.label: .* has no column 'species'; its columns: image, label, red"):
        TableSource(kind="table", path=path, label="species").open()
    renamed = write_csv(folder / "odder.csv", rows, ["red", "patient"])
    with pytest.raises(UserError, match="no column is known to be the image; set data.source.image"):
        TableSource(kind="table", path=renamed).open()
    with pytest.raises(UserError, match=r"expected .csv, .tsv, .jsonl or .parquet, not '.xlsx'"):
        TableSource(kind="table", path=(folder / "x.xlsx")).open() if (folder / "x.xlsx").write_bytes(b"PK") else None


def test_a_missing_file_is_a_bad_row(photos, tmp_path):
    folder, rows = photos
    gone = [{**rows[0], "image": "files/gone.png"}, *rows[1:]]
    path = write_csv(folder / "gone.csv", gone, ["image", "label"])
    source = {"kind": "table", "path": str(path)}
    with pytest.raises(UserError, match="1 listed image is missing, such as 'files/gone.png'"):
        ensure_prepared(DataConfig.model_validate({"source": source, "prepared": tmp_path / "strict"}), 0)
    data = DataConfig.model_validate({"source": source, "prepared": tmp_path / "lax", "on_bad_image": "skip"})
    prepared = ensure_prepared(data, 0)
    assert sum(split.samples for split in prepared.splits.values()) == len(rows) - 1
    assert sum(len(split.skipped) for split in prepared.splits.values()) == 1


def test_groups_stay_in_one_split(photos, tmp_path, capsys):
    folder, rows = photos
    path = write_csv(folder / "groups.csv", rows, ["image", "label", "patient"])
    source = {"kind": "table", "path": str(path)}
    data = {"source": source, "split_by": "group", "val_fraction": 0.25, "prepared": tmp_path / "groups"}
    prepared = ensure_prepared(DataConfig.model_validate(data), 0)
    assert "group = 'patient'" in (told := capsys.readouterr().err)
    assert "val: 4 images, of 1 group, 25% of each class" in told or "val: 5 images, of 1 group, 25% of each class" in told
    patient = {row["image"]: row["patient"] for row in rows}
    of = {split: {patient[name] for name in names_of(prepared, split)} for split in ("train", "val")}
    assert of["val"]
    assert not of["train"] & of["val"]
    assert prepared.train_counts.min() > 0
    by_name = ensure_prepared(DataConfig.model_validate({**data, "split_by": "-([0-9])[.]png", "prepared": tmp_path / "b"}), 0)
    numbers = {split: {name[-5] for name in names_of(by_name, split)} for split in ("train", "val")}
    assert not numbers["train"] & numbers["val"]
    with pytest.raises(UserError, match="is not found in the image's name 'files/"):
        ensure_prepared(DataConfig.model_validate({**data, "split_by": "(camera)"}), 0)


def test_a_column_that_only_has_a_groups_name_is_none(photos, capsys):
    """One cell is empty, or another table lacks the column; a column that is named has to be whole."""
    folder, rows = photos
    some = [{**row, "location": "" if number == 3 else "here"} for number, row in enumerate(rows)]
    path = write_csv(folder / "location.csv", some, ["image", "label", "location"])
    assert TableSource(kind="table", path=path).open().train.groups is None
    assert "group =" not in capsys.readouterr().err
    with pytest.raises(UserError, match="the column 'location' is empty"):
        TableSource(kind="table", path=path, group="location").open()
    whole = write_csv(folder / "whole.csv", [{**row, "location": "here"} for row in rows], ["image", "label", "location"])
    without = write_csv(folder / "without.csv", rows[:3], ["image", "label"])
    assert TableSource(kind="table", path=whole).open().train.groups is not None
    assert TableSource(kind="table", path=whole, val=without).open().train.groups is None


def test_a_group_column_decides_only_where_the_configuration_says_so(photos, tmp_path, capsys):
    folder, rows = photos
    path = write_csv(folder / "camera.csv", [{**row, "camera": row["label"]} for row in rows], ["image", "label", "camera"])
    content = {"source": {"kind": "table", "path": str(path)}, "val_fraction": 0.5}
    prepared = ensure_prepared(DataConfig.model_validate({**content, "prepared": tmp_path / "a"}), 0)
    assert "val: 9 images, 50% of each class, are set aside" in (told := capsys.readouterr().err)
    assert "each image by itself, although the source has groups; for whole groups set data.split_by: group" in told
    plain = write_csv(folder / "camera.csv", rows, ["image", "label"])
    source = {"kind": "table", "path": str(plain)}
    same = ensure_prepared(DataConfig.model_validate({**content, "source": source, "prepared": tmp_path / "b"}), 0)
    assert names_of(prepared, "val") == names_of(same, "val")
    assert "groups" not in capsys.readouterr().err


@pytest.mark.parametrize("share", ["val_fraction", "test_fraction"])
def test_a_split_that_no_class_has_groups_for_is_refused(photos, tmp_path, share):
    folder, rows = photos
    path = write_csv(folder / "one.csv", [{**row, "patient": row["label"]} for row in rows], ["image", "label", "patient"])
    content = {"source": {"kind": "table", "path": str(path)}, "split_by": "group", "prepared": tmp_path / share, share: 0.2}
    with pytest.raises(UserError, match=rf"data.{share}: no class has two groups of training images \(data.split_by\)"):
        ensure_prepared(DataConfig.model_validate(content), 0)


def test_own_splits_that_share_a_group_are_refused(photos, tmp_path):
    folder, rows = photos
    path = write_csv(folder / "shared.csv", rows, ["image", "label", "split", "patient"])
    data = {"source": {"kind": "table", "path": str(path)}, "split_by": "group", "prepared": tmp_path / "shared"}
    with pytest.raises(UserError, match=r"6 test images, such as 'files/ash-6.png', are of groups that train has"):
        ensure_prepared(DataConfig.model_validate(data), 0)


def names_of(prepared, split: str) -> list[str]:
    return (prepared.folder / f"{split}.files.txt").read_text().split()


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Breaks the first connections of each file."""

    breaks = 2
    seen: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        count = self.seen[self.path] = self.seen.get(self.path, 0) + 1
        if count <= self.breaks:
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def flaky_server(photos):
    folder, rows = photos
    handler = type("Handler", (Flaky,), {"seen": {}, "breaks": 2})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler, rows
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_read_again_when_the_network_breaks(flaky_server, tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "_FIRST_WAIT", 0.01)
    address, handler, rows = flaky_server
    some = [{**row, "image": f"{address}/{row['image']}?token=secret{number}"} for number, row in enumerate(rows[::2])]
    path = write_csv(tmp_path / "web.csv", some, ["image", "label"])
    data = DataConfig.model_validate({"source": {"kind": "table", "path": str(path)}, "prepared": tmp_path / "web"})
    prepared = ensure_prepared(data, 0)
    assert sum(split.samples for split in prepared.splits.values()) == len(some)
    assert set(handler.seen.values()) == {3}
    written = b"".join(file.read_bytes() for file in prepared.folder.rglob("*") if file.is_file())
    assert b"secret" not in written

    handler.breaks = 100
    again = DataConfig.model_validate({**data.model_dump(), "prepared": tmp_path / "never"})
    with pytest.raises(UserError, match=r"cannot be read after 5 tries") as caught:
        ensure_prepared(again, 0)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [410, 401, 403, 503])
def test_an_address_that_is_gone_is_a_bad_image_and_one_without_access_is_not(photos, tmp_path, monkeypatch, status):
    monkeypatch.setattr(addresses, "_FIRST_WAIT", 0.001)
    folder, rows = photos
    seen = []

    class Refusing(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if "oak-1" in self.path:
                seen.append(self.path)
                self.send_error(status)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with served(Refusing, folder) as address:
        some = [{**row, "image": f"{address}/{row['image']}"} for row in rows]
        path = write_csv(tmp_path / "dead.csv", some, ["image", "label", "split"])
        content = {"source": {"kind": "table", "path": str(path)}, "prepared": tmp_path / "p"}
        skipping = DataConfig.model_validate({**content, "on_bad_image": "skip"})
        if status != 410:  # it may answer later, or with other credentials
            said = {503: "cannot be read .*"}.get(
                status, "access is refused, HTTP "
            ) + rf"status {status}.* \(data\.on_bad_image"
            with pytest.raises(UserError, match=rf"oak-1\.png: {said} does not skip it"):
                ensure_prepared(skipping, 0)
            return
        with pytest.raises(UserError, match=rf"oak-1\.png: unreadable image \(.*{status}\); .*data\.on_bad_image: skip"):
            ensure_prepared(DataConfig.model_validate(content), 0)
        prepared = ensure_prepared(skipping, 0)
    assert [name.rpartition("/")[2] for name in prepared.splits["train"].skipped] == ["oak-1.png"]
    assert len(seen) == 2  # once a command


def test_access_that_is_refused_in_a_bucket_stops_the_command_and_keeps_what_is_written(photos, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    folder, rows = photos
    memory = fsspec.filesystem("memory")
    for row in rows:
        memory.pipe_file(f"{tmp_path}/{row['image']}", (folder / row["image"]).read_bytes())
    some = [{**row, "image": f"memory://{tmp_path}/{row['image']}"} for row in rows]
    path = write_csv(tmp_path / "bucket.csv", some, ["image", "label", "split"])
    original, calls = type(memory).cat_file, []

    def cat_file(self, *arguments, **more):  # as s3fs says it of a token that has expired
        calls.append(1)
        if len(calls) == 8:
            raise PermissionError("The provided token has expired.")
        return original(self, *arguments, **more)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    monkeypatch.setattr(writer, "_SMALLEST", 1 << 19)  # two images a file
    content = {"source": {"kind": "table", "path": str(path)}, "prepared": tmp_path / "p", "on_bad_image": "skip"}
    data = DataConfig.model_validate({**content, "store": {"shard_mb": 1}})
    with pytest.raises(
        UserError, match=r"access is refused; set its credentials .*; stopped: \d+ of 12 train images are in fin"
    ):
        ensure_prepared(data, 0)
    assert ensure_prepared(data, 0).splits["train"].samples == 12


def test_a_bucket_is_read_with_the_environments_credentials(photos, tmp_path, bucket):
    import fsspec

    folder, rows = photos
    storage = fsspec.filesystem("s3")
    for row in rows:
        storage.pipe_file(f"{bucket}/{row['image']}", (folder / row["image"]).read_bytes())
    path = write_csv(
        tmp_path / "bucket.csv", [{**row, "image": f"{bucket}/{row['image']}"} for row in rows], ["image", "label", "split"]
    )
    dataset = TableSource(kind="table", path=path).open()
    assert reds(dataset.train) == expected(rows, "train")
    storage.rm_file(f"{bucket}/{rows[0]['image']}")
    with pytest.raises(FileNotFoundError, match="nothing is at this address"):
        TableSource(kind="table", path=path).open().train.read(0)


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_cell_in_quotes_may_hold_what_separates_columns(photos, delimiter):
    folder, rows = photos
    named = [{**row, "label": f"{row['label']}{delimiter} wild"} for row in rows]
    path = write_csv(folder / "quoted.csv", named, ["image", "label"], delimiter=delimiter, header=False)
    dataset = TableSource(kind="table", path=path).open()
    assert dataset.classes == [f"{name}{delimiter} wild" for name in COUNTS]
    assert reds(dataset.train) == [row["red"] for row in rows]


@pytest.mark.parametrize("header", [True, False])
def test_a_comma_in_quotes_does_not_hide_the_semicolons(photos, header):
    folder, rows = photos
    named = [{**row, "label, of the tree": f"{row['label']}, wild"} for row in rows]
    columns = ["image", "label, of the tree"]
    path = folder / "semicolons.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";", quoting=csv.QUOTE_ALL)
        writer.writerows([columns] if header else [])
        writer.writerows([row[column] for column in columns] for row in named)
    dataset = TableSource(kind="table", path=path, label=columns[1] if header else None).open()
    assert dataset.classes == [f"{name}, wild" for name in COUNTS]
