"""The comparison on photographs: what is done is not done again, and the table is of the lines."""

import json

from benchmarks import photos_table
from benchmarks.photos_table import COLUMNS, markdown
from cibl_ray.evaluation.metrics import Scores


def scores(value: float) -> Scores:
    numbers = {**dict.fromkeys([*COLUMNS, "head", "middle", "tail", "loss"], value), "few": None}
    return Scores(**numbers, samples=1, per_class=[value])


def test_a_stopped_comparison_continues_and_its_table_is_of_its_lines(tmp_path, monkeypatch):
    asked = []

    def row(name, flags, seed, run):
        asked.append((name, seed))
        return scores(0.5 + 0.1 * seed), 3.0 + seed, "command"

    monkeypatch.setattr(photos_table, "_row", row)
    lines = tmp_path / "lines.jsonl"
    names = ["full", "scikit-learn, plain"]
    photos_table.make_table(tmp_path, tmp_path, names, 1, lines)
    table = photos_table.make_table(tmp_path, tmp_path, names, 3, lines)
    assert asked == [(name, seed) for seed in range(3) for name in names]
    assert [json.loads(line)["seed"] for line in lines.read_text().splitlines()] == [0, 0, 1, 1, 2, 2]
    assert "| full | 60.0 ± 10.0 | 60.0 ± 10.0 | 60.0 ± 10.0 | 60.0 ± 10.0 | – | 60.0 ± 10.0 |" in table
    assert table.splitlines()[-1].endswith("| 4 | 3 |")
    assert markdown([]).count("\n") == 1
