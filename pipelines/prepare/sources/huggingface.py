"""A data set of Hugging Face: on disk as `save_to_disk` leaves it, or on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from pipelines.common.errors import UserError
from pipelines.common.fields import PathIfThere
from pipelines.prepare.sources.contents import held
from pipelines.prepare.sources.dataset import AbsentError, Dataset, Images, SourceConfig, classes_of, numbered
from pipelines.prepare.sources.names import name_key

_SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}


def _local(value: str) -> str:
    """A folder's absolute path; another text, a name on the hub, as it is."""
    try:
        place = Path(value).expanduser()
        return str(place.absolute()) if place.is_dir() else value
    except (OSError, RuntimeError, ValueError):  # too long, no home, or with a NUL
        return value


class HuggingFaceSource(SourceConfig):
    """A data set of the library `datasets`. Its image and label columns are found by their features."""

    kind: Literal["huggingface"]
    path: Annotated[str, AfterValidator(_local), PathIfThere] = Field(
        description="a folder that save_to_disk wrote, or the name of a data set on the hub"
    )
    name: str | None = Field(default=None, description="the data set's configuration, where it has several")
    image: str | None = Field(default=None, description="column of the images; null: the only one with the feature Image")
    label: str | None = Field(default=None, description="column of the classes; null: the only ClassLabel, or 'label'")
    group: str | None = Field(default=None, description="column with the patient, camera or site, for data.split_by: group")
    splits: dict[Literal["train", "val", "test"], str] | None = Field(
        default=None, description="the data set's names of the splits; null: train, validation and test, where they exist"
    )

    def open(self) -> Dataset:
        """Open the data set; images are decoded later.

        Raises:
            UserError: The library is not installed, or a data set, split or column is missing.
            AbsentError: The same of the library, or of the data set, where that is on the hub.
        """
        found = self._load()
        train = found["train"]
        image, label = self._image_column(train), self._label_column(train)
        names = getattr(train.features[label], "names", None)
        values = {split: [_as_text(value, names) for value in each[label]] for split, each in found.items()}
        unlabelled = next((split for split, each in values.items() if "" in each), None)
        if unlabelled is not None:
            row = values[unlabelled].index("")
            raise UserError(f"data set {self.path!r}, {unlabelled}: image {row} has no label; leave that split out of splits")
        trained = {*values["train"]}
        listed = {name_key(name): name for name in names if name in trained} if names is not None else None
        classes, label_of = classes_of(values["train"], repr(self.path), listed)
        if self.group is not None:
            for each in found.values():
                self._column(each, "group", self.group, [])
        groups = numbered(str(value) for each in found.values() for value in each[self.group]) if self.group else {}
        images = {}
        for split, each in found.items():
            strange = next((value for value in values[split] if value not in label_of), None)
            if strange is not None:
                raise UserError(f"data set {self.path!r}: the class {strange!r} of {split} has no training image")
            images[split] = Images(
                [f"{split}/{row}" for row in range(len(each))],
                np.array([label_of[value] for value in values[split]], dtype=np.int64),
                content=_Rows(each, image, f"{self.path}, {split}", np.arange(len(each))),
                groups=np.array([groups[str(value)] for value in each[self.group]]) if self.group else None,
            )
        return Dataset(classes, images["train"], images.get("val"), images.get("test"))

    def present(self) -> bool:
        """Whether the folder exists; a data set of the hub is taken to be there, until `open`."""
        return not Path(self.path).expanduser().is_absolute() or Path(self.path).expanduser().is_dir()

    def _load(self) -> dict[str, Any]:
        """The data set of each split."""
        place = Path(self.path).expanduser()
        cannot = UserError if place.is_dir() else AbsentError
        try:
            import datasets
        except ImportError as error:
            raise cannot(
                "data.source.kind: huggingface needs the package datasets: pip install 'cibl-ray[huggingface]'"
            ) from error
        try:
            loaded = datasets.load_from_disk(str(place)) if place.is_dir() else datasets.load_dataset(self.path, self.name)
        except Exception as error:  # the library has dozens: of the hub, of files, of formats
            raise cannot(
                f"data set {self.path!r} cannot be opened: {' '.join(str(error).split())[:300]}; give a folder that "
                "save_to_disk wrote, or a name on the hub"
            ) from error
        there: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {"train": loaded}
        if self.splits is not None:
            wanted: dict[str, str] = {str(split): name for split, name in self.splits.items()}
            absent = next((name for name in wanted.values() if name not in there), None)
            if absent is not None:
                raise UserError(f"data.source.splits: {self.path!r} has no split {absent!r}; it has {', '.join(there)}")
        else:
            wanted = {split: name for split, names in _SPLITS.items() for name in reversed(names) if name in there}
        if "train" not in wanted:
            raise UserError(f"data set {self.path!r} has the splits {', '.join(there)}; say which is train: data.source.splits")
        return {split: there[name] for split, name in wanted.items()}

    def _image_column(self, data: Any) -> str:
        import datasets

        found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
        return self._column(data, "image", self.image, found)

    def _label_column(self, data: Any) -> str:
        import datasets

        found = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        return self._column(data, "label", self.label, found or [name for name in ("label", "class") if name in data.features])

    def _column(self, data: Any, what: str, given: str | None, found: list[str]) -> str:
        if given is not None and given not in data.features:
            raise UserError(f"data.source.{what}: {self.path!r} has no column {given!r}; it has {', '.join(data.features)}")
        if given is None and len(found) != 1:
            several = f"several, {', '.join(found)}" if found else f"none among {', '.join(data.features)}"
            raise UserError(f"data set {self.path!r}: which column is the {what}? {several}; set data.source.{what}")
        return given or found[0]


class _Rows:
    """The images of a data set's rows."""

    def __init__(self, data: Any, column: str, place: str, rows: np.ndarray) -> None:
        import datasets

        self._data, self._column, self._place, self._rows = data, column, place, rows
        self._encoded = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def __reduce__(self) -> tuple[Any, ...]:
        return held(self, len(self._rows))  # the library's cache is this machine's

    def read(self, index: int) -> bytes:
        """The encoded file, from the row or from the path in it."""
        cell = self._encoded[int(self._rows[index])][self._column]
        if cell is None:
            raise OSError(0, "no image: the cell is empty")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def take(self, indices: np.ndarray) -> _Rows:
        """Some of the rows."""
        return _Rows(self._data, self._column, self._place, self._rows[indices])

    def place(self, index: int) -> str:
        """The data set, the split and the row."""
        return f"{self._place}, row {self._rows[index]}"

    def stamp(self) -> Iterator[bytes]:
        """The library's fingerprint of the data, and the rows."""
        yield str(self._data._fingerprint).encode()
        yield self._rows.tobytes()


def _as_text(value: Any, names: list[str] | None) -> str:
    """A label as its class's name; empty where there is none, or the -1 of test sets without labels."""
    if value is None or (names is not None and isinstance(value, int) and not 0 <= value < len(names)):
        return ""
    return names[value] if names is not None and isinstance(value, int) else str(value).strip()
