"""A table: a row an image, with its path, address or bytes, its class, and where there are some, split, group and weight."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.common.words import plural
from pipelines.formats import readable_suffixes
from pipelines.prepare.sources.addresses import Remote, without_secrets
from pipelines.prepare.sources.contents import Spooled
from pipelines.prepare.sources.dataset import Below, Dataset, Images, SourceConfig, classes_of, numbered
from pipelines.prepare.sources.names import hint_for, name_key, read_text, refuse_alike
from pipelines.prepare.sources.repeats import repeated
from pipelines.prepare.sources.texts import Codes, Texts

# Names by which a column is found, compared without case, spaces and underscores; earlier ones first.
_IMAGE = ("image", "path", "imagepath", "filepath", "filename", "file", "img", "imgpath", "url", "uri", "imageurl", "imageid")
_LABEL = ("label", "class", "classname", "category", "target", "species", "labelname", "categoryname", "classid", "categoryid")
_SPLIT = ("split", "subset", "partition", "fold", "set")
_GROUP = ("group", "groupid", "patient", "patientid", "site", "siteid", "camera", "cameraid", "location", "subject")
_WEIGHT = ("weight", "sampleweight", "sampleweights", "imageweight", "weights")
_SPLITS = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "tst": "test",
}  # fmt: skip
_AT_ONCE = 1 << 16  # cells that are Python objects at a time
_BLOCK = 64  # the same, where they hold images
_BUFFER = 1 << 20  # bytes of a Parquet file that are read ahead, where it holds images


class TableSource(SourceConfig):
    """A CSV, TSV, JSON lines or Parquet file with a row an image. A CSV file may have semicolons.

    Columns that are not given are found by their names, and printed.
    """

    kind: Literal["table"]
    path: Path = Field(description="the table: .csv, .tsv, .jsonl, .ndjson or .parquet; all rows, or the training rows")
    val: Path | None = Field(default=None, description="a table of the validation images with the same columns")
    test: Path | None = Field(default=None, description="a table of the test images with the same columns")
    root: Path | None = Field(default=None, description="folder that paths are relative to; null: the table's own folder")
    image: str | None = Field(default=None, description="column with the path, the address or the bytes of the image")
    label: str | None = Field(default=None, description="column with the class: text or a whole number")
    split: str | None = Field(default=None, description="column that says train, val or test")
    group: str | None = Field(default=None, description="column with the patient, camera or site, for data.split_by: group")
    weight: str | None = Field(
        default=None, description="column with the weight of a training image, at least 0, for data.sampling: weighted"
    )
    header: Literal["auto"] | bool = Field(
        default="auto", description="whether the first line of a CSV or TSV file names the columns; without, they are 0, 1, ..."
    )
    classes: Path | None = Field(
        default=None, description="the classes in label order, one a line: a value of the column, and after a tab, a name"
    )

    def open(self) -> Dataset:
        """Read the table's columns; images are read later.

        Raises:
            UserError: A table or column is missing, a cell is empty, or a class has no training image.
        """
        tables = {split: _read(path, self.header) for split, path in self._paths().items()}
        first = tables["train"]
        columns = self._columns(first, [*tables.values()])
        parts = [_rows(table, columns, self.root, None if split == "train" else split) for split, table in tables.items()]
        found = {value for part in parts for value in part.labels.values}
        listed = self._listed()
        classes, label_of = classes_of(found, str(self.path), listed)
        splits: dict[str, list[Images]] = {}
        groups = numbered([value for part in parts if part.groups is not None for value in part.groups.values])
        left_out = 0
        for part in parts:
            labels = part.labels.numbered(label_of)
            left_out += int(np.count_nonzero(labels < 0))
            images = part.images(labels, None if part.groups is None else part.groups.numbered(groups))
            for number, split in enumerate(part.splits.values):
                rows = np.flatnonzero((part.splits.codes == number) & (labels >= 0))
                splits.setdefault(split, []).append(images if len(rows) == len(images) else images.take(rows))
        for split, several in splits.items():
            if len(several) > 1:
                raise UserError(
                    f"{self.path}: the column {columns.split!r} has rows of the split {split!r}, which has a table too"
                )
        if left_out:
            print(
                f"data: {plural(left_out, 'row', 'are')} of classes that {str(self.classes)!r} does not name", file=sys.stderr
            )
        if "train" not in splits:
            raise UserError(f"{self.path}: no row has the split 'train'; the column {columns.split!r} says {[*splits][:3]}")
        (train,) = splits["train"]
        absent = np.flatnonzero(np.bincount(train.labels, minlength=len(classes)) == 0)
        if absent.size:
            raise UserError(f"{self.path}: the class {classes[absent[0]]!r} has no training image")
        held_out = {split: several[0] for split, several in splits.items()}
        return Dataset(classes, train, held_out.get("val"), held_out.get("test"))

    def present(self) -> bool:
        """Whether the tables exist."""
        return all(path.is_file() for path in self._paths().values())

    def identity(self) -> dict[str, object]:
        """A weight column that is not given leaves the name of the prepared folder as it was before there were weights."""
        content = super().identity()
        return content if self.weight is not None else {key: value for key, value in content.items() if key != "weight"}

    def _paths(self) -> dict[str, Path]:
        named = {"train": self.path, "val": self.val, "test": self.test}
        return {split: path for split, path in named.items() if path is not None}

    def _listed(self) -> dict[str, str] | None:
        """The class name of each value, as the file `classes` has them, in its order."""
        if self.classes is None:
            return None
        rows = []
        for number, line in enumerate(read_text(self.classes, "classes").split("\n"), start=1):
            if line.strip():
                value, _, name = line.partition("\t")
                rows.append((f"{self.classes}:{number}", value.strip(), name.strip() or value.strip()))
        refuse_alike([value for _, value, _ in rows], [place for place, _, _ in rows])
        return {name_key(value): name for _, value, name in rows}

    def _columns(self, table: _Table, tables: list[_Table]) -> _Columns:
        image = _column(table, "image", self.image, _IMAGE)
        label = _column(table, "label", self.label, _LABEL)
        if image is None or label is None:
            image, label = _by_content(table, image, label)
        split = _column(table, "split", self.split, _SPLIT, _say_splits)
        group = _column(table, "group", self.group, _GROUP, lambda _, name: all(_is_whole(each, name) for each in tables))
        weight = _column(table, "weight", self.weight, _WEIGHT, lambda table, name: _are_weights(table, name, split))
        found = {"image": image, "label": label, "split": split, "group": group, "weight": weight}
        given = {name: getattr(self, name) for name in found}
        guessed = ", ".join(f"{name} = {column!r}" for name, column in found.items() if column and not given[name])
        others = [] if split else [repr(name) for name in table.names if _plain(name) in _SPLIT and name not in found.values()]
        told = [f"columns found by name: {guessed} (data.source.image and so on)"] if guessed else []
        told += [f"not taken for the split, because no cell says train, val or test: {', '.join(others)}"] if others else []
        if told:
            print(f"data: {table.path}: {'; '.join(told)}", file=sys.stderr)
        return _Columns(image, label, split, group, weight)


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str
    split: str | None
    group: str | None
    weight: str | None


@dataclass(frozen=True)
class _Table:
    """A table without the columns that hold images as bytes, which are read when they are needed."""

    path: Path
    rows: int
    names: list[str]
    batches: Callable[[str], Iterable[Any]]  # the pyarrow.RecordBatches of a column
    bytes_in: list[str]  # columns of bytes, or of structs with bytes, as Hugging Face writes them
    headed: bool

    def column(self, name: str) -> Iterator[Any]:
        """The cells of a column; not all of them are Python objects at a time."""
        with _reading(self.path):
            for batch in self.batches(name):
                yield from batch.column(name).to_pylist()


@dataclass(frozen=True)
class _Rows:
    """What a table says of its images, a value a row."""

    names: Texts
    labels: Codes
    splits: Codes
    groups: Codes | None
    weights: np.ndarray | None
    files: Below | None
    content: Remote | Spooled | None

    def images(self, labels: np.ndarray, groups: np.ndarray | None) -> Images:
        missing = (
            ()
            if self.files is None
            else tuple(name for name, file in zip(self.names, self.files, strict=True) if not file.is_file())
        )
        return Images(
            self.names, labels, files=self.files, content=self.content, groups=groups, missing=missing, weights=self.weights
        )


def _read(path: Path, header: bool | Literal["auto"]) -> _Table:
    if not path.is_file():
        raise UserError(f"table {str(path)!r} does not exist{hint_for(path)}")
    try:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.json
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("data.source.kind: table needs the package pyarrow: pip install 'cibl-ray[data]'") from error
    ending = path.suffix.lower()
    headed = True
    with _reading(path):
        match ending:
            case ".csv" | ".tsv" | ".txt":
                delimiter = _delimiter(path) if ending == ".csv" else "\t"
                headed = _has_header(path, delimiter) if header == "auto" else header
                first = _split_line(_first_lines(path)[0], delimiter)
                names = None if headed else [str(number) for number in range(len(first))]
                content = pa.csv.read_csv(
                    path,
                    read_options=pa.csv.ReadOptions(column_names=names),
                    parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                    # All as text: a label 007 or 1e5 is what stands there, and no column is text in one block only.
                    convert_options=pa.csv.ConvertOptions(
                        column_types=dict.fromkeys(names or first, pa.string()),
                        strings_can_be_null=True,
                        null_values=[""],
                    ),
                )
            case ".jsonl" | ".ndjson" | ".json":
                content = pa.json.read_json(path)
            case ".parquet" | ".pq":
                file = pa.parquet.ParquetFile(path)
                of_bytes = [field.name for field in file.schema_arrow if _holds_bytes(field.type)]
                rows, names = file.metadata.num_rows, file.schema_arrow.names
                _refuse_twice(path, names)
                return _Table(path, rows, names, lambda name: _batches(path, name, _AT_ONCE), of_bytes, True)
            case _:
                raise UserError(f"table {str(path)!r}: expected .csv, .tsv, .jsonl or .parquet, not {ending or 'no ending'!r}")
    _refuse_twice(path, content.column_names)

    def batches(name: str) -> Iterable[Any]:
        return content.select([name]).to_batches(max_chunksize=_AT_ONCE)

    return _Table(path, len(content), content.column_names, batches, [], headed)


def _refuse_twice(path: Path, columns: list[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise UserError(f"table {str(path)!r} has the column {twice[0]!r} twice; rename one")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which table it is that cannot be read."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"table {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"table {str(path)!r} cannot be read: {error.strerror or error}") from error


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _first_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig") as file:
        return [line.rstrip("\r\n") for line, _ in zip(file, range(2), strict=False)] or [""]


def _delimiter(path: Path) -> str:
    """What separates the columns of a CSV file: spreadsheets of many countries write semicolons."""
    first = re.sub(r'"[^"]*"', "", _first_lines(path)[0])  # without what is quoted
    return ";" if ";" in first and "," not in first else ","


def _split_line(line: str, delimiter: str) -> list[str]:
    import csv

    return next(csv.reader([line], delimiter=delimiter), [])


def _has_header(path: Path, delimiter: str) -> bool:
    """Whether no cell of the first line looks like an image."""
    return not any(_looks_like_image(cell) for cell in _split_line(_first_lines(path)[0], delimiter))


def _looks_like_image(cell: object) -> bool:
    text = str(cell).lower().partition("?")[0]
    return text.endswith(readable_suffixes()) and len(text) > 4


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _column(table: _Table, what: str, given: str | None, known: tuple[str, ...], fits: Any = None) -> str | None:
    """The column that is given, or the first one with a known name."""
    if given is not None:
        if given not in table.names:
            raise UserError(
                f"data.source.{what}: {str(table.path)!r} has no column {given!r}; its columns: {', '.join(table.names[:20])}"
            )
        if given in table.bytes_in and what != "image":
            raise UserError(f"data.source.{what}: the column {given!r} of {str(table.path)!r} holds bytes; name another one")
        return given
    named = {_plain(name): name for name in reversed(table.names)}
    found = [named[name] for name in known if name in named]
    return next((name for name in found if fits is None or fits(table, name)), None)


def _say_splits(table: _Table, name: str) -> bool:
    """Whether some cell of a column says a split. Another one may have that name, such as the numbers of folds.

    A cell that says none is then a mistake (`_split_of`): without the column, test rows would be trained on.
    """
    return name not in table.bytes_in and any(str(value).strip().lower() in _SPLITS for value in table.column(name))


def _is_whole(table: _Table, name: str) -> bool:
    """Whether a table has a column without an empty cell. Another one may have a group's name, such as a location."""
    cells = table.column(name) if name in table.names and name not in table.bytes_in else [None]
    return all(value is not None and str(value).strip() for value in cells)


def _are_weights(table: _Table, name: str, split: str | None) -> bool:
    """Whether a column has a weight in every training row. Another one may have that name, such as what an animal weighs."""
    if name in table.bytes_in:
        return False
    splits = table.column(split) if split is not None else repeat("train", table.rows)
    rows = zip(table.column(name), splits, strict=True)
    return all(_number(value) is not None for value, of in rows if _SPLITS.get(str(of).strip().lower()) == "train")


def _number(value: object) -> float | None:
    """A cell as a weight: finite and at least 0; None where it is none."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 and not isinstance(value, bool) else None


def _by_content(table: _Table, image: str | None, label: str | None) -> tuple[str, str]:
    """The columns of image and label where names do not tell: the one whose cells look like images, and the only other one."""
    others = [name for name in table.names if name != label]
    if image is None:
        rows = [name for name in others if name in table.bytes_in] or [
            name
            for name in others
            if name not in table.bytes_in and all(map(_looks_like_image, islice(table.column(name), 20)))
        ]
        image = rows[0] if len(rows) == 1 else None
    left = [name for name in table.names if name != image and name not in table.bytes_in]
    if image is not None and label is None and len(left) == 1:
        label = left[0]
    if image is None or label is None:
        missing = "image" if image is None else "label"
        raise UserError(
            f"table {str(table.path)!r}: no column is known to be the {missing}; set data.source.{missing} to one of "
            f"{', '.join(map(repr, table.names[:20]))}"
        )
    return image, label


def _rows(table: _Table, columns: _Columns, root: Path | None, split: str | None) -> _Rows:
    """What a table says. split: of all its rows, where the table is of one split alone."""
    needed = [columns.image, columns.label] + ([columns.group] if columns.group else [])
    needed += [columns.weight] if columns.weight and split in (None, "train") else []
    absent = [name for name in needed if name not in table.names]
    if absent:
        raise UserError(f"table {str(table.path)!r} has no column {absent[0]!r}, as the first table has")
    labels = Codes(_texts(table, columns.label))
    count = len(labels)
    if not count:
        raise UserError(f"table {str(table.path)!r} has no rows")
    groups = None if columns.group is None else Codes(_texts(table, columns.group))
    splits = Codes(repeat(split or "train", count))
    if split is None and columns.split is not None:
        cells = enumerate(table.column(columns.split))
        splits = Codes(_split_of(table, columns.split, row, value) for row, value in cells)
    weights = None
    if columns.weight is not None and "train" in splits.values:
        trained = splits.codes == splits.values.index("train")
        cells = enumerate(table.column(columns.weight))
        each = (_weight_of(table, columns.weight, row, value) if trained[row] else 1.0 for row, value in cells)
        weights = np.fromiter(each, np.float64, count)
    if columns.image in table.bytes_in:
        names = Texts(f"{table.path.name}/{row + 1}" for row in range(count))
        stat = table.path.stat()
        stamp = f"{stat.st_size} {stat.st_mtime_ns} {columns.image}".encode()
        content = Spooled(count, lambda: _cells(table.path, columns.image), lambda row: f"{table.path}, row {row + 1}", stamp)
        return _Rows(names, labels, splits, groups, weights, None, content)
    paths = Texts(_texts(table, columns.image))
    remote = np.fromiter(("://" in path for path in paths), bool, count)
    if remote.any() and not remote.all():
        other = int((remote != remote[0]).argmax())
        raise UserError(f"{_place(table, other)}: addresses and paths are mixed; give either addresses or paths")
    _refuse_repeats(table, paths, splits)
    if remote[0]:
        return _Rows(_public_names(paths), labels, splits, groups, weights, None, Remote(paths))
    folder = root if root is not None else table.path.parent
    return _Rows(paths, labels, splits, groups, weights, Below(folder, paths), None)


def _public_names(addresses: Texts) -> Texts:
    """The addresses without what may be a secret, and with their row where that leaves two alike."""
    if all(without_secrets(address) == address for address in addresses):
        return addresses
    names = Texts(map(without_secrets, addresses))
    alike = np.zeros(len(names), dtype=bool)
    for pair in repeated(names.digests()):
        alike[[*pair]] = True
    return Texts(f"{name}#{row}" if alike[row] else name for row, name in enumerate(names)) if alike.any() else names


def _refuse_repeats(table: _Table, paths: Texts, splits: Codes) -> None:
    for first, row in repeated(paths.digests()):
        split, before = (splits.values[splits.codes[each]] for each in (row, first))
        both = "" if before == split else f", as {before} and as {split}"
        raise UserError(f"{_place(table, row)}: {paths[row]!r} stands in row {first + 1} already{both}; remove one")


def _texts(table: _Table, column: str) -> Iterator[str]:
    """The cells of a column as text."""
    return (_text(table, column, row, value) for row, value in enumerate(table.column(column)))


def _text(table: _Table, column: str, row: int, value: object) -> str:
    """A cell as text; a whole number without a point."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else "" if value is None else str(value).strip()
    if not text:
        raise UserError(f"{_place(table, row)}: the column {column!r} is empty; fill it, or remove the row")
    return text


def _split_of(table: _Table, column: str, row: int, value: object) -> str:
    split = _SPLITS.get(str(value).strip().lower())
    if split is None:
        what = "is empty" if value is None or not str(value).strip() else f"is {value!r}"
        raise UserError(
            f"{_place(table, row)}: the column {column!r} {what}; expected train, val or test: correct the cell, remove the "
            "row, or rename the column if it does not say splits"
        )
    return split


def _weight_of(table: _Table, column: str, row: int, value: object) -> float:
    weight = _number(value)
    if weight is None:
        what = "is empty" if value is None or not str(value).strip() else f"is {value!r}"
        raise UserError(f"{_place(table, row)}: the column {column!r} {what}; expected a weight, a number of at least 0")
    return weight


def _place(table: _Table, row: int) -> str:
    return f"{table.path}, row {row + 1}"


def _cells(path: Path, column: str) -> Iterator[bytes | None]:
    """The images of a Parquet column from first to last, a few rows in memory at a time."""
    for batch in _batches(path, column, _BLOCK):
        for cell in batch.column(column).to_pylist():
            yield (
                cell
                if isinstance(cell, bytes | None)
                else next((value for value in cell.values() if isinstance(value, bytes)), None)
            )


def _batches(path: Path, column: str, rows: int) -> Iterator[Any]:
    """A column of a Parquet file from first to last, so many rows in memory at a time."""
    import pyarrow.parquet

    # By default pyarrow reads all row groups ahead: the whole column, into memory.
    file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    yield from file.iter_batches(batch_size=rows, columns=[column])
