"""The tables' commands are configurations that exist, and their smoke budget runs from images to Markdown."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import claims, reproduce_report
from benchmarks.many_runs import Run, RunsFailedError, computed, run_all
from benchmarks.reproduce import line_is_of, record
from benchmarks.reproduce_cells import BUDGETS, TABLES, cells
from cibl_ray.config import doubts, load_config, save_config
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("table", TABLES)
def test_every_cell_is_a_configuration(table, budget):
    every = cells(table, budget, 2, 0.0)
    assert len({cell.name for cell in every}) == len(every)
    for cell in every:
        if cell.seed == 0:
            config = load_config(cell.config, list(cell.options))
            assert config.train.epochs <= (400 if cell.value in ("twice the epochs", "PaCo") else 200)
            assert config.seed == 0
            assert doubts(config) == []


@pytest.mark.parametrize("name", claims.BUDGETS)
def test_every_cell_of_the_claims_is_a_configuration(name):
    budget = claims.BUDGETS[name]
    every = claims.cells(budget, ["cifar10", "cifar100"])
    configs = {run.name: load_config(run.config, list(run.options)) for run in claims._runs(every, {}, budget)}
    assert len(configs) == len(every)
    assert configs["cifar10-method-Hybrid-PSC-0"].loss.temperature == 1.0  # as its authors set it there
    assert configs["cifar100-method-Hybrid-PSC-0"].loss.temperature == 0.1
    assert {config.network.backbone for config in configs.values()} == {"resnet32" if budget.full else "resnet20"}
    heads = {name: config.network.head.kind for name, config in configs.items()}
    assert all(head == ("cosine" if "-cosine-" in name else "linear") for name, head in heads.items())
    if budget.full:
        assert configs["cifar100-method-Hybrid-SC-0"].train.batch_size == 512
        assert configs["cifar100-method-BCL-0"].data.views[0].augment


def test_recipes_change_one_thing_and_are_scored_on_validation(tmp_path):
    every = {cell.value: load_config(cell.config, list(cell.options)) for cell in cells("recipe", "cpu", 1, 0.1)}
    base = every.pop("base").model_dump(mode="json")
    assert base["data"]["val_fraction"] == 0.1
    for config in every.values():
        changed = config.model_dump(mode="json")
        assert sum(changed[part] != base[part] for part in base) == 1
    # No score of the test set stands in the line of a run.
    folder = tmp_path / "run"
    folder.mkdir()
    cell = cells("recipe", "cpu", 1, 0.1)[0]
    save_config(load_config(cell.config, list(cell.options)), folder / "config.yaml")
    result = {
        "last": {"epoch": 6, "scores": {}},
        "best": {"epoch": 5, "scores": {}},
        "hardware": "CPU",
        "loader": "x",
        "data": {},
    }
    (folder / "result.json").write_text(json.dumps({**result, "seconds": 9.0, "images_per_s": 1.0}))
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 6, "val": {"overall": 0.25, "head": 0.5}}) + "\n")
    line = record(cell, folder, "recipe", "cpu", "abc")
    assert "--data.source" not in line["command"]  # torchvision's files, as the configuration has them
    assert line["source"] == "cifar100"
    assert (line["last"]["overall"], line["last"]["head"], line["last"]["few"]) == (0.25, 0.5, None)
    assert "best" not in line


def test_the_published_tables_are_whole():
    for table in ("cifar10_lt", "cifar100_lt"):
        every = cells(table, "gpu", 3, 0.0)
        assert len(every) == 9 * 3 * 3
        configs = {cell.value: load_config(cell.config, list(cell.options)) for cell in every if cell.imbalance == 100}
        assert {config.network.backbone for config in configs.values()} == {"resnet32"}
        assert {config.train.epochs for name, config in configs.items() if name != "PaCo"} == {200}
        assert configs["PaCo"].train.epochs == 400
        assert (configs["Hybrid-SC"].train.batch_size, configs["Hybrid-SC"].optimizer.lr) == (512, 0.5)
        assert configs["CIBL, linear head"].network.head.kind == "linear"
        assert configs["CIBL, cosine head"].network.head.kind == "cosine"
    assert load_config("cifar10_lt", list(cells("cifar10_lt", "gpu", 1, 0.1)[0].options)).data.val_fraction == 0.1


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_hybrids_recipe_is_the_tables(dataset):
    """The shipped file says what the table trains."""
    every = {cell.value: cell for cell in cells(f"{dataset}_lt", "gpu", 1, 0.0) if cell.imbalance == 100}
    for value in ("Hybrid-SC", "Hybrid-PSC"):
        cell = every[value]
        loss = ["--loss", cell.options[cell.options.index("--loss") + 1]] if value == "Hybrid-PSC" else []
        shipped, trained = load_config(f"recipes/hybrid_{dataset}_lt", loss), load_config(cell.config, list(cell.options))
        assert computed(shipped) == computed(trained)


@pytest.fixture(scope="module")
def small_cifar(tmp_path_factory, photos):
    """Ten classes of 100 training and 3 test images, 32 pixels wide, from photographs."""
    root, random = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    image = Image.open(photos[0]).convert("RGB")
    for label in range(10):
        for split, count in (("train", 100), ("test", 3)):
            (root / split / str(label)).mkdir(parents=True)
            for number in range(count):
                left, top = random.integers(0, 600), random.integers(0, 390)
                image.crop((left, top, left + 32, top + 32)).save(root / split / str(label) / f"{number}.png")
    return root


def test_smoke(small_cifar, tmp_path):
    command = [sys.executable, "-m", "benchmarks.reproduce", "cifar10_lt", "--budget", "smoke", "--methods", "CE", "Hybrid-SC"]
    places = ["--cifar10", str(small_cifar)]
    places += [part for name in ("prepared", "runs", "docs") for part in (f"--{name}", str(tmp_path / name))]
    done = subprocess.run([*command, *places], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["runs"], found["of"]) == (2, 9)
    lines = reproduce_report.read(tmp_path / "docs" / "cifar10_lt-smoke.jsonl")
    assert {line["value"] for line in lines} == {"CE", "Hybrid-SC"}
    assert str(tmp_path) not in (tmp_path / "docs" / "cifar10_lt-smoke.jsonl").read_text()
    for line in lines:
        assert line["command"].startswith(
            "python -m cibl_ray.train cifar10_lt --data.source.kind folder --data.source.path FOLDER"
        )
        assert 0 <= line["last"]["overall"] <= 1
        assert line["machine"]["torch"]
    text = (tmp_path / "docs" / "cifar10_lt-smoke.md").read_text()
    assert text.index("| CE |") < text.index("| Hybrid-SC |")
    assert "no published number" in text
    assert (tmp_path / "docs" / "cifar10_lt-smoke-cifar10-if100.png").stat().st_size > 5000
    # Again: nothing is trained twice.
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("result.json"))]
    assert len(before) == 2
    again = subprocess.run([*command, *places], cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("result.json"))] == before
    assert reproduce_report.read(tmp_path / "docs" / "cifar10_lt-smoke.jsonl") == lines
    # Another recipe under the same name is neither taken for this one's result nor written over.
    lines_file = tmp_path / "docs" / "cifar10_lt-smoke.jsonl"
    assert all(entry["wall_seconds"] > entry["seconds"] > 0 for entry in lines)
    old = [entry if entry["value"] != "CE" else entry | {"recipe": "another"} for entry in lines]
    lines_file.write_text("".join(json.dumps(entry) + "\n" for entry in old))
    path = next((tmp_path / "runs").rglob("*CE-0/config.yaml"))
    text = path.read_text()
    path.write_text(text.replace("weight_decay: 0.0002", "weight_decay: 0.3"))
    changed = subprocess.run([*command, *places], cwd=REPOSITORY, capture_output=True, text=True)
    assert changed.returncode == 2
    assert "holds a run of another configuration (optimizer differ): remove it" in changed.stderr
    path.write_text(text)
    mended = subprocess.run([*command, *places], cwd=REPOSITORY, capture_output=True, text=True)
    assert mended.returncode == 0, mended.stderr
    assert {entry["recipe"] for entry in reproduce_report.read(lines_file)} == {entry["recipe"] for entry in lines}
    # The table is drawn of all lines, whichever rows are asked for; and of none whose recipe is another by now.
    stale = [entry if entry["value"] != "CE" else entry | {"recipe": "another"} for entry in lines]
    lines_file.write_text("".join(json.dumps(entry) + "\n" for entry in stale) + '{"table": "cifar10_lt", "bud')
    drawn = subprocess.run([*command[:-1], *places, "--report-only"], cwd=REPOSITORY, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    text = (tmp_path / "docs" / "cifar10_lt-smoke.md").read_text()
    assert "1 of 9 runs" in text
    assert "| Hybrid-SC |" in text
    assert "| CE |" not in text
    wrong = subprocess.run([*command[:-2], "Nonsense", *places], cwd=REPOSITORY, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "no row 'Nonsense'; there are: BCL, CE" in wrong.stderr


def test_a_run_that_fails_is_told_and_the_others_go_on(small_cifar, tmp_path, capfd):
    place = ("--data.source.kind", "folder", "--data.source.path", str(small_cifar), "--prepared", str(tmp_path / "prepared"))
    tiny = (*place, "--epochs", "1", "--warmup_epochs", "0", "--backbone", "resnet20", "--data.profile.largest", "100")
    every = [
        Run("diverges", "cifar10_lt", (*tiny, "--lr", "1e30", "--batch_size", "32")),
        Run("good", "cifar10_lt", (*tiny, "--batch_size", "32")),
    ]
    took = {}
    with pytest.raises(RunsFailedError, match=r"1 of 2 runs failed: diverges: error: the loss is not finite"):
        run_all(every, tmp_path / "runs", 1, lambda run, seconds: took.update({run.name: seconds}))
    assert list(took) == ["good"]
    assert took["good"] > 1
    # No time left: nothing is begun; and what has a result is not run again.
    run_all(every[1:], tmp_path / "runs", 1, lambda run, seconds: took.clear())
    run_all([replace(every[1], name="late")], tmp_path / "runs", 1, seconds=-1)
    assert list(took) == ["good"]
    assert not (tmp_path / "runs" / "late").exists()


def line(value, seed, overall, table="cifar100_lt", budget="gpu", best=None):
    names = ("overall", "many", "medium", "few", "head", "middle", "tail")
    scores = {"epoch": 200, **dict.fromkeys(names, overall), "few": None}
    found = {
        "table": table, "budget": budget, "dataset": "cifar100", "imbalance": 100, "value": value, "seed": seed,
        "command": "python", "commit": "abc", "machine": {"torch": "2"}, "hardware": "H100", "seconds": 90.0, "last": scores,
    }  # fmt: skip
    return found | ({"best": {**scores, "overall": best}} if best is not None else {})


def test_ours_stands_beside_the_published_number(tmp_path):
    lines = [line("Hybrid-SC", seed, overall, best=0.5) for seed, overall in enumerate((0.46, 0.47, 0.48))]
    lines += [line("CIBL, cosine head", 0, 0.55)]
    reproduce_report.write(tmp_path / "t.jsonl", lines, of=9)
    text = (tmp_path / "t.md").read_text()
    assert "4 of 9 runs" in text
    assert "| Hybrid-SC | 47.0 ± 1.0 (3) |" in text
    row = next(row for row in text.splitlines() if row.startswith("| Hybrid-SC"))
    assert row.endswith("| 50.0 ± 0.0 (3) | 46.7 | 1.5 |")
    assert "| – | – | 1.5 |" in next(row for row in text.splitlines() if row.startswith("| CIBL"))  # neither is published
    assert "H100, torch 2. Commit: abc." in text


def test_lines_are_read_back_and_the_last_of_a_cell_counts(tmp_path):
    path = tmp_path / "t.jsonl"
    assert reproduce_report.read(path) == []
    for overall in (0.1, 0.2):
        reproduce_report.add(path, line("CE", 0, overall))
    assert [entry["last"]["overall"] for entry in reproduce_report.read(path)] == [0.2]


def test_a_line_after_one_that_was_cut_short_is_whole(tmp_path):
    path = tmp_path / "t.jsonl"
    reproduce_report.add(path, line("CE", 0, 0.1))
    path.write_text(path.read_text() + '{"table": "cif')
    reproduce_report.add(path, line("CE", 1, 0.2))
    assert [entry["seed"] for entry in reproduce_report.read(path)] == [0, 1]


def test_shipped_recipes_are_the_tables():
    for dataset in ("cifar10", "cifar100"):
        for cell in cells(f"{dataset}_lt", "gpu", 1, 0.0):
            if cell.value == "CIBL, cosine head":
                shipped = load_config(f"recipes/{dataset}_lt_if{cell.imbalance}_200", [])
                assert computed(shipped) == computed(load_config(cell.config, list(cell.options)))


def test_old_lines_count_while_their_command_is_the_cells():
    cell = cells("cifar10_lt", "cpu", 1, 0.0)[0]
    old = {"command": shlex.join(["python", "-m", "cibl_ray.train", cell.config, *cell.options])}
    assert line_is_of(old, cell, "abc")
    assert not line_is_of(old, replace(cell, options=(*cell.options[:-1], "7")), "abc")
    assert line_is_of({**old, "recipe": "abc"}, cell, "abc")
    assert not line_is_of({**old, "recipe": "abc"}, cell, "d")
