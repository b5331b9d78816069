"""Where images and labels come from. A source is one file with a `SourceConfig`, and one line in the union `Source`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.prepare.sources.archive import ArchiveSource
from pipelines.prepare.sources.cifar import Cifar10Source, Cifar100Source
from pipelines.prepare.sources.dataset import Dataset, Images, SourceConfig, class_counts
from pipelines.prepare.sources.digits import DigitsSource
from pipelines.prepare.sources.folder import FolderSource, open_folder
from pipelines.prepare.sources.huggingface import HuggingFaceSource
from pipelines.prepare.sources.lists import ListsSource, read_list
from pipelines.prepare.sources.table import TableSource
from pipelines.prepare.sources.webdataset import WebDatasetSource

Source = Annotated[
    FolderSource
    | ListsSource
    | TableSource
    | ArchiveSource
    | WebDatasetSource
    | HuggingFaceSource
    | Cifar10Source
    | Cifar100Source
    | DigitsSource,
    Field(discriminator="kind"),
]  # fmt: skip

__all__ = [
    "ArchiveSource",
    "Cifar10Source",
    "Cifar100Source",
    "Dataset",
    "DigitsSource",
    "FolderSource",
    "HuggingFaceSource",
    "Images",
    "ListsSource",
    "Source",
    "SourceConfig",
    "TableSource",
    "WebDatasetSource",
    "class_counts",
    "open_folder",
    "read_list",
]
