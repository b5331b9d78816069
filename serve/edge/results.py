"""Answers in a file: a table (CSV), or JSON lines."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError

ENDINGS = (".csv", ".jsonl")
COLUMNS = ("image", "rank", "label", "probability", "group", "index", "problem")


class Results:
    """A file that grows with each answer. Use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        """Open a new file.

        Args:
            path: Its ending says how it is written: .csv has a row for each class of each image, .jsonl a line for each image.

        Raises:
            UserError: It exists, or cannot be written.
        """
        if path.is_file():
            raise UserError(f"{str(path)!r} exists; remove it, or name another file (--out)")
        try:
            # A file's name may be in another encoding.
            self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        except OSError as error:
            raise UserError(f"--out {str(path)!r} cannot be written: {error.strerror}; give another file") from error
        self._table = csv.DictWriter(self._file, COLUMNS) if path.suffix.lower() == ".csv" else None
        if self._table is not None:
            self._table.writeheader()

    def write(self, image: str, top: list[dict[str, Any]], problem: str | None = None) -> None:
        """Add the answer of one image.

        Args:
            image: Its place.
            top: Its most likely classes; none if there is a problem.
            problem: Why there is no answer.
        """
        if self._table is None:
            answer: dict[str, Any] = {"top": top} if problem is None else {"problem": problem}
            self._file.write(json.dumps({"image": image, **answer}) + "\n")
        elif problem is not None:
            self._table.writerow({"image": image, "problem": problem})
        else:
            self._table.writerows({"image": image, "rank": rank, **entry} for rank, entry in enumerate(top, 1))

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
