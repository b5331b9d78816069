"""The evaluate command: a row for each image, and what it says of options and folders that do not fit."""

import csv
import json
from collections import Counter

import pytest

from cibl_ray import evaluate
from cibl_ray.run.checkpoint import load_checkpoint
from pipelines.common.errors import UserError
from pipelines.prepare.build import ensure_prepared
from tests.commands import in_process


def test_a_folder_of_images_without_classes(image_folder, monkeypatch):
    folder = image_folder / "train" / "one"
    monkeypatch.setattr("sys.argv", ["evaluate", "runs/a", "--data", str(folder)])
    with pytest.raises(UserError) as caught:
        evaluate.main()
    message = str(caught.value)
    assert message.startswith(f"--data {folder}: 6 images are directly in it, without classes; to evaluate, put them into")
    assert f"{folder}/CLASS/*" in message
    assert message.endswith(f"python -m cibl_ray.predict runs/a {folder}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "few"], "--metric few says how --tail-shift auto chooses; add that"),
        (["--json", "."], "is a folder; name a file in it"),
        (["--checkpoint", "best"], "--checkpoint best is for a run folder, and .*last.safetensors' is a file"),
    ],
)
def test_options_that_say_nothing_here_are_refused(more, message, tmp_path, monkeypatch):
    (tmp_path / "last.safetensors").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path / "last.safetensors"), *more])
    with pytest.raises(UserError, match=message):
        evaluate.main()


def test_a_row_for_each_image(run_folder, tmp_path):
    out, scores = tmp_path / "answers.csv", tmp_path / "scores.json"
    done = in_process(evaluate.main, run_folder, "--split", "test", "--out", out, "--json", scores)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [*rows[0]] == ["checkpoint", "image", "label", "class", "probability", "label_probability"]
    for name, measured in json.loads(scores.read_text()).items():
        if name == "classes":
            continue
        stem = name.split()[0]
        of_one = [row for row in rows if row["checkpoint"] == stem]
        right = [row["label"] == row["class"] for row in of_one]
        assert sum(right) / len(right) == pytest.approx(measured["overall"])
        for row, correct in zip(of_one, right, strict=True):
            difference = float(row["probability"]) - float(row["label_probability"])
            assert difference == 0 if correct else difference >= 0
        prepared = ensure_prepared(load_checkpoint(run_folder / "checkpoints" / f"{stem}.safetensors").config.data, 0)
        assert [row["image"] for row in of_one] == prepared.names("test")
        assert Counter(row["label"] for row in of_one) == dict(
            zip(prepared.classes, prepared.splits["test"].counts, strict=True)
        )
    one = in_process(evaluate.main, run_folder, "--out", tmp_path / "x", "--json", tmp_path / "x")
    assert "--out and --json name one file" in one.stderr
    again = in_process(evaluate.main, run_folder, "--out", out)
    assert again.returncode == 2
    assert "answers.csv' exists; remove it, or name another file (--out)" in again.stderr
