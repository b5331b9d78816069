"""The formats that docs/reference describes by hand are those of real files."""

import json
import re
import struct

import jsonschema
import pytest

from pipelines.prepare.beton import Beton
from tests.conftest import REPOSITORY

REFERENCE = REPOSITORY / "docs" / "reference"


def check(name: str, content: object) -> None:
    schema = json.loads((REFERENCE / "schemas" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(content)


def test_run_folder(run_folder):
    check("result", json.loads((run_folder / "result.json").read_text()))
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        check("metrics", json.loads(line))
    page = (REFERENCE / "run-folder.md").read_text()
    written = {path.name for path in [*run_folder.iterdir(), *(run_folder / "checkpoints").iterdir()]}
    assert len(written) > 10
    assert [name for name in sorted(written) if not re.search(rf"[`/]{re.escape(name)}[`/]", page)] == []


def test_bundle(bundle):
    check("manifest", json.loads((bundle / "manifest.json").read_text()))
    page = (REFERENCE / "bundle.md").read_text()
    assert all(f"`{path.name}`" in page for path in bundle.iterdir())


def test_schemas_refuse_what_is_no_result(run_folder):
    result = json.loads((run_folder / "result.json").read_text())
    result["last"]["scores"]["overall"] = 61.5  # percent, and not a share
    with pytest.raises(jsonschema.ValidationError):
        check("result", result)


def table(heading: str) -> list[tuple[int, str]]:
    """(offset, type) of a table in prepared-folder.md."""
    text = (REFERENCE / "prepared-folder.md").read_text()
    rows = re.search(rf"^\| {heading}, at \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)[1].splitlines()
    return [(int(cells[1]), cells[2].strip()) for cells in (row.split("|") for row in rows)]


def unpack(heading: str, data: bytes, at: int) -> list:
    codes = {"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q", "int64": "q", "16 bytes": "16s", "1,024 bytes": "1024s"}
    return [struct.unpack_from("<" + codes[kind], data, at + offset)[0] for offset, kind in table(heading)]


def test_beton_file_can_be_read_by_the_tables_alone(digits):
    check("prepared", json.loads((digits.folder / "prepared.json").read_text()))
    data, known = (digits.folder / "val.beton").read_bytes(), Beton(digits.folder / "val.beton")
    version, fields, page, samples, allocations = unpack("header", data, 0)
    assert (version, fields, samples) == (2, 2, len(known))
    assert [unpack("field", data, 24 + 1041 * number)[1].rstrip(b"\0") for number in range(2)] == [b"image", b"label"]
    for number in range(samples):
        mode, width, height, at, label = unpack("record", data, 2106 + 24 * number)
        sample, begins, size = unpack("allocation", data, allocations + 24 * number)
        assert (sample, begins, size) == (number, at, 3 * width * height)
        assert (mode, label) == (1, known.labels[number])
        assert at // page == (at + size - 1) // page
        assert data[at : at + size] == known.image(number).tobytes()
