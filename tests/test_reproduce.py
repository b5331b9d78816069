"""The tables' commands are configurations that exist, and their smoke budget runs from images to Markdown."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from benchmarks import gpu_session
from benchmarks.many_runs import Run, RunsFailedError, computed, run_all
from benchmarks.reproduce import __main__ as reproduce
from benchmarks.reproduce import equal_cost, front
from benchmarks.reproduce import lines as reproduce_lines
from benchmarks.reproduce import report as reproduce_report
from benchmarks.reproduce.cells import BUDGETS, ON_VALIDATION, TABLES, cells
from benchmarks.reproduce.cost import multiply_adds, pflop
from benchmarks.reproduce.lines import failed, is_of, of_cell, record
from benchmarks.reproduce.pace import seconds_a_pass
from cibl_ray.config import load_config, save_config
from cibl_ray.config_warnings import config_warnings
from cibl_ray.hardware import resolve
from cibl_ray.run.fingerprint import code_digest
from cibl_ray.run.log import read_metrics
from cibl_ray.training.passes import passes
from pipelines.common.config_file import find_config
from pipelines.common.errors import Interrupted
from pipelines.prepare.build import ensure_prepared
from tests.commands import in_process
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("table", TABLES)
def test_every_cell_is_a_configuration(table, budget):
    every = cells(table, budget, 2, 0.0)
    assert len({cell.name for cell in every}) == len(every)
    for cell in every:
        if cell.seed == 0:
            config = load_config(cell.config, list(cell.options))
            longer = {"twice the epochs": 400, "PaCo": 400, "ProCo": 400, "balanced softmax": 620}
            assert config.train.epochs <= longer.get(cell.value, 461 if table == "length" else 200)
            assert config.seed == 0
            told = config_warnings(config)
            needs_length = cell.value == "CMO" or cell.value.endswith("second view in the second half")
            assert told == [] or (needs_length and config.train.epochs <= 6 and len(told) == 1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_readings_differ_in_the_loss_alone(budget):
    every = {cell.value: load_config(cell.config, list(cell.options)) for cell in cells("readings", budget, 1, 0.0)}
    assert len(every) == 15
    base = every["plain, λ=0.05"].model_dump(mode="json")
    for config in every.values():
        assert {part for part, value in config.model_dump(mode="json").items() if value != base[part]} <= {"loss"}
        assert config.network.head.kind == "linear"
    assert every["log-prior, λ=5.0"].loss.kappa == 1
    assert every["normalised by class, λ=0.5"].loss.normalize == "class"


def test_the_search_changes_one_thing_at_about_equal_cost():
    """Length alone costs more; two views have half the epochs."""
    every = {cell.value: load_config(cell.config, list(cell.options)) for cell in cells("search", "laptop", 1, 0.1)}
    assert len(every) >= 24
    base = every["base"]
    cost = passes(base, 76, base.train.epochs).trained
    for value, config in every.items():
        assert (config.data.val_fraction, config.data.profile.imbalance) == (0.1, 100)
        times = {"twice the epochs": 2, "three times the epochs": 3, "SAM in the last fifth": 1.2}.get(value.split(", ρ")[0], 1)
        batches = 76 * 128 // config.train.batch_size
        assert passes(config, batches, config.train.epochs).equivalent == pytest.approx(times * cost, rel=0.04)


@pytest.mark.parametrize(("dataset", "images"), [("cifar100", 10_847), ("cifar10", 12_406)])
def test_equal_cost_is_equal(dataset, images):
    every = [cell for cell in cells("equal_cost", "laptop", 1, 0.0) if cell.dataset == dataset]
    assert len(every) >= 11
    for cell in every:
        config = load_config(cell.config, list(cell.options))
        cost = passes(config, images // config.train.batch_size).equivalent
        assert cost == pytest.approx(1e6, rel=0.03)
        assert config.schedule.kind == "cosine"
    of = {cell.value: load_config(cell.config, list(cell.options)).loss for cell in every}
    assert (of["Hybrid-PSC"].temperature, of["VS"].logit_gamma) == {"cifar10": (1.0, 0.15), "cifar100": (0.1, 0.05)}[dataset]


def test_a_run_of_another_length_has_the_recipe_of_equal_cost():
    short = {cell.value: cell for cell in cells("equal_cost", "laptop", 1, 0.0) if cell.dataset == "cifar100"}
    every = {cell.value: cell for cell in cells("length", "laptop", 1, 0.0)}
    assert len(every) == 14
    for value, cell in every.items():
        method, length = value.removesuffix(" M passes").rsplit(", ", 1)
        method, found, _ = method.partition(", weight decay 1e-3")
        of, other = (load_config(one.config, list(one.options)) for one in (cell, short[method]))
        assert of.train.epochs * len(of.data.views) * 10_847 == pytest.approx(float(length) * 1e6, rel=0.01)
        lengthened = other.model_copy(update={"train": other.train.model_copy(update={"epochs": of.train.epochs})})
        if found:
            lengthened = lengthened.model_copy(
                update={"optimizer": lengthened.optimizer.model_copy(update={"weight_decay": 1e-3})}
            )
        assert of == lengthened


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
        "code": ["0123456789ab"],
    }
    (folder / "result.json").write_text(json.dumps({**result, "seconds": 9.0, "images_per_s": 1.0}))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"epoch": 6, "train": {}, "rate": {}, "seconds": {}, "val": {"overall": 0.25, "head": 0.5}}) + "\n"
    )
    line = record(cell, folder, "recipe", "cpu")
    assert (line["commit"], line["code"]) == (None, ["0123456789ab"])  # not the code that is checked out
    assert "--data.source" not in line["command"]  # torchvision's files, as the configuration has them
    assert line["source"] == "cifar100"
    assert (line["last"]["overall"], line["last"]["head"], line["last"]["few"]) == (0.25, 0.5, None)
    assert "best" not in line


def test_the_published_tables_are_whole():
    for table in ("cifar10_lt", "cifar100_lt"):
        every = cells(table, "gpu", 3, 0.0)
        assert len(every) == 11 * 3 * 3
        configs = {cell.value: load_config(cell.config, list(cell.options)) for cell in every if cell.imbalance == 100}
        assert {config.network.backbone.title for config in configs.values()} == {"resnet32"}
        assert {config.data.profile.subset for config in configs.values()} == {"field"}
        longer = {name: config.train.epochs for name, config in configs.items() if config.train.epochs != 200}
        assert longer == {"PaCo": 400} | (
            {"balanced softmax": 542} if table == "cifar10_lt" else {"balanced softmax": 620, "ProCo": 400}
        )
        steps = {"cifar10_lt": 12406, "cifar100_lt": 10847}[table] // 512 * longer["balanced softmax"]
        assert 13000 <= steps < 13050
        assert configs["CIBL, linear head"].network.head.kind == "linear"
        assert configs["CIBL, cosine head"].network.head.kind == "cosine"
    assert load_config("cifar10_lt", list(cells("cifar10_lt", "gpu", 1, 0.1)[0].options)).data.val_fraction == 0.1
    values = {cell.value for cell in cells("cifar100_lt", "laptop", 1, 0.0)}
    assert {"CIBL, cosine head", "CIBL, cosine head, λ = 0.005", "CIBL, cosine head, λ = 0.1", "VS", "ProCo"} < values


def figures_of(content):
    """What a recipe says, by dotted name."""
    found = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}.{key}" if name else key, part)
        else:
            found[name] = value

    walk("", content)
    return found


PLAIN = {"optimizer.kind": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": False}
RESNET32 = PLAIN | {"network.backbone": "resnet32"}
LINEAR = {"network.head.kind": "linear"}
COSINE_30 = {"network.head.kind": "cosine", "network.head.scale.start": 30, "network.head.weight_norm": 1}
CROSS_ENTROPY = {"loss.kind": "cross_entropy"}
OF_LDAM = RESNET32 | {
    "optimizer.lr": 0.1, "optimizer.weight_decay": 2e-4, "train.epochs": 200, "train.batch_size": 128, "schedule.kind": "steps",
    "schedule.milestones": [0.8, 0.9], "schedule.gamma": 0.01, "schedule.warmup_epochs": 5, "schedule.warmup_by": "epoch",
}  # fmt: skip
OF_BCL = {"loss.kind": "bcl", "network.projection.norm": True, "loss.contrast_views": "others", "loss.classify": "first"}
OF_PROCO = RESNET32 | LINEAR | {
    "optimizer.lr": 0.3, "optimizer.weight_decay": 2e-4, "train.batch_size": 256, "network.projection.hidden": 512,
    "network.projection.size": 128, "network.projection.norm": True, "loss.kind": "proco", "loss.temperature": 0.1,
    "loss.contrastive_weight": 1, "schedule.kind": "steps", "schedule.gamma": 0.1, "schedule.warmup_by": "epoch",
}  # fmt: skip
OF_PACO = {"loss.kind": "paco", "loss.beta": 1, "loss.momentum": 0.999, "network.projection.norm": True} | LINEAR
OF_IMAGENET = PLAIN | COSINE_30 | {
    "network.backbone": "resnet50", "optimizer.lr": 0.1, "optimizer.weight_decay": 5e-4, "train.epochs": 90,
    "train.batch_size": 256, "schedule.kind": "cosine", "schedule.warmup_epochs": 0, "network.projection.hidden": 2048,
    "network.projection.size": 1024, "network.projection.norm": True, "loss.temperature": 0.07,
}  # fmt: skip
# What papers' ingredients are put together from, by this project.
OF_INGREDIENTS = RESNET32 | LINEAR | {
    "optimizer.lr": 0.1, "train.epochs": 400, "train.batch_size": 128, "schedule.kind": "cosine", "schedule.warmup_epochs": 5,
}  # fmt: skip
# Figures of the papers' code; docs/reference/recipes.md says what else there is.
FIGURES = {
    "ce_cifar100_lt": OF_LDAM | LINEAR | CROSS_ENTROPY,
    "ldam_cifar100_lt": OF_LDAM | COSINE_30 | {"loss.kind": "ldam", "loss.max_margin": 0.5, "loss.reweight_from": 0.8},
    "vs_cifar100_lt": OF_LDAM | LINEAR | {
        "optimizer.weight_decay": 5e-4, "loss.kind": "vs", "loss.logit_gamma": 0.05, "loss.kappa": 1,
    },
    "balanced_softmax_cifar100_lt": RESNET32 | LINEAR | {
        "loss.kind": "balanced_softmax", "optimizer.lr": 0.1, "optimizer.weight_decay": 5e-4, "train.batch_size": 512,
        "train.epochs": 620, "schedule.kind": "cosine", "schedule.warmup_epochs": 39,
    },
    "hybrid_cifar100_lt": RESNET32 | LINEAR | {
        "loss.kind": "hybrid_sc", "optimizer.lr": 0.5, "optimizer.weight_decay": 1e-4, "train.batch_size": 512,
        "schedule.kind": "steps", "schedule.milestones": [0.6, 0.8], "schedule.warmup_epochs": 5, "loss.temperature": 0.1,
        "train.epochs": 200,
    },
    "bcl_cifar100_lt": RESNET32 | COSINE_30 | OF_BCL | {
        "optimizer.lr": 0.15, "optimizer.weight_decay": 5e-4, "train.batch_size": 256, "train.epochs": 200,
        "loss.cross_entropy_weight": 2, "loss.contrastive_weight": 0.6, "loss.temperature": 0.1, "schedule.kind": "steps",
        "schedule.milestones": [0.8, 0.9], "schedule.warmup_epochs": 5, "schedule.warmup_by": "epoch",
        "network.projection.hidden": 512, "network.projection.size": 128,
    },
    "paco_cifar100_lt": RESNET32 | OF_PACO | {
        "optimizer.lr": 0.05, "optimizer.weight_decay": 5e-4, "train.batch_size": 128, "train.epochs": 400,
        "loss.alpha": 0.01, "loss.temperature": 0.05, "loss.queue": 1024, "network.projection.hidden": 64,
        "network.projection.size": 32, "schedule.kind": "steps", "schedule.warmup_epochs": 10, "schedule.warmup_by": "epoch",
        "schedule.milestones": [0.8, 0.9],
    },
    "proco_cifar100_lt": OF_PROCO | {"train.epochs": 200, "schedule.warmup_epochs": 5, "schedule.milestones": [0.8, 0.9]},
    "proco_cifar100_lt_400": OF_PROCO | {"train.epochs": 400, "schedule.warmup_epochs": 10, "schedule.milestones": [0.9, 0.95]},
    "mixup_cifar100_lt": OF_LDAM | LINEAR | CROSS_ENTROPY | {"train.mixup": 1, "schedule.gamma": 0.1},
    "vs_sam_cifar100_lt": OF_INGREDIENTS | {
        "loss.kind": "vs", "loss.logit_gamma": 0.05, "loss.kappa": 1, "optimizer.weight_decay": 2e-4,
        "optimizer.sam.rho": 0.3, "optimizer.sam.start": 0,
    },
    "cmo_cifar100_lt": OF_INGREDIENTS | {
        "loss.kind": "balanced_softmax", "optimizer.weight_decay": 5e-4, "train.cmo.chance": 0.5, "train.cmo.first_epochs": 4,
        "train.cmo.last_epochs": 3,
    },
    "bcl_imagenet_lt": OF_IMAGENET | OF_BCL | {"loss.cross_entropy_weight": 1, "loss.contrastive_weight": 0.35},
    "proco_imagenet_lt": OF_IMAGENET | {"loss.kind": "proco", "loss.contrastive_weight": 1},
    "paco_imagenet_lt": PLAIN | OF_PACO | {
        "network.backbone": "resnet50", "optimizer.lr": 0.02, "optimizer.weight_decay": 5e-4, "train.epochs": 400,
        "train.batch_size": 128, "loss.temperature": 0.2, "loss.queue": 8192, "loss.alpha": 0.05,
        "network.projection.hidden": 2048, "network.projection.size": 128, "schedule.kind": "cosine",
        "schedule.warmup_epochs": 10, "schedule.warmup_by": "epoch",
    },
}  # fmt: skip
# Their views: a cut, and operations.
CROP, FLIP, GRAY, BLUR = ("crop", 4), ("flip", 0.5), ("grayscale", 0.2), ("blur", 0.5)
JITTER, PLAIN_JITTER = (("color_jitter", 0.4, 0.4, 0.4, hue, chance) for hue, chance in ((0.1, 0.8), (0, 1)))
AUTO, CUTOUT = ("auto_augment", "cifar10", "authors"), ("cutout", 16)
RAND = ("rand_augment", 2, 10, "timm", 0.5, 0.5)
SIMPLE, STRONG = [CROP, FLIP], [CROP, FLIP, AUTO, CUTOUT]
SECOND, WIDE = ([("resized", low, 1), FLIP, JITTER, GRAY] for low in (0.2, 0.08))
VIEWS = {
    **{key: [SIMPLE] for key in ("ce_cifar100_lt", "ldam_cifar100_lt", "vs_cifar100_lt", "mixup_cifar100_lt")},
    **{key: [STRONG] for key in ("balanced_softmax_cifar100_lt", "vs_sam_cifar100_lt", "cmo_cifar100_lt")},
    "hybrid_cifar100_lt": [[CROP, FLIP, GRAY]] * 2,
    "bcl_cifar100_lt": [STRONG, SECOND, SECOND],
    "paco_cifar100_lt": [STRONG, [*SECOND, BLUR]],
    **{key: [STRONG, WIDE, WIDE] for key in ("proco_cifar100_lt", "proco_cifar100_lt_400")},
    **{key: [[("resized", 0.08, 1), FLIP, PLAIN_JITTER, RAND], WIDE, WIDE] for key in ("bcl_imagenet_lt", "proco_imagenet_lt")},
    "paco_imagenet_lt": [
        [("resized", 0.08, 1), FLIP, PLAIN_JITTER, RAND], [("resized", 0.08, 1), FLIP, PLAIN_JITTER, GRAY, BLUR],
    ],
}  # fmt: skip
NO_FIGURES = ("seed", "data.")  # of the recipe: the data set's


def view_of(view):
    """A view's cut, flip and operations, with what the papers say of each."""
    cut = view["cut"]
    parts = [("crop", cut["padding"]) if cut["kind"] == "crop" else ("resized", *cut["scale"]), ("flip", view["flip"])]
    said = {
        "auto_augment": ("policy", "style"),
        "blur": ("probability",),
        "color_jitter": ("brightness", "contrast", "saturation", "hue", "probability"),
        "cutout": ("size",),
        "grayscale": ("probability",),
        "rand_augment": ("count", "magnitude", "style", "noise", "probability"),
    }
    return [*parts, *((part["kind"], *(part[field] for field in said[part["kind"]])) for part in view["augment"])]


@pytest.mark.parametrize("name", FIGURES)
def test_a_papers_recipe_has_its_figures(name):
    config = load_config(f"recipes/{name}", [])
    found, wanted = figures_of(config.model_dump(mode="json")), FIGURES[name]
    assert {field: found.get(field) for field in wanted} == wanted
    assert [view_of(view) for view in found["data.views"]] == VIEWS[name]
    assert config_warnings(config) == []
    # Nothing that the file says is left unheld.
    written = figures_of(yaml.safe_load(find_config(f"recipes/{name}").read_text()))
    assert {field.replace("sam.from", "sam.start") for field in written if not field.startswith(NO_FIGURES)} <= {*wanted}
    if "imagenet" in name:
        return
    assert found["data.profile.subset"] == "field"
    if name in ("vs_sam_cifar100_lt", "cmo_cifar100_lt"):  # of this data set alone
        return
    # CIFAR-10's is the same, but for what the papers set by data set.
    other = figures_of(load_config(f"recipes/{name.replace('100', '10')}", []).model_dump(mode="json"))
    by_data = {
        "balanced_softmax_cifar100_lt": {"train.epochs": 542, "schedule.warmup_epochs": 34},
        "vs_cifar100_lt": {"loss.logit_gamma": 0.15},
    }
    different = {field: other[field] for field in found if found[field] != other[field] and not field.startswith(NO_FIGURES)}
    assert different == by_data.get(name, {})
    assert found["data.views"] == other["data.views"]


def test_the_best_short_recipe_is_the_measured_one():
    epochs, options = equal_cost.lengths(100, 200)["CIBL, λ = 0.002, weight decay 1e-3, 1 M passes"]
    measured = load_config("cifar100_lt", [*options, "--epochs", str(epochs)])
    assert load_config("recipes/cibl_cifar100_lt", []) == measured


def test_no_recipe_claims_to_be_a_papers_that_it_is_not():
    """Nesterov momentum is the projects' own choice; files named after a method have plain momentum."""
    for path in (REPOSITORY / "configs" / "recipes").glob("*.yaml"):
        own = path.stem.startswith(("cibl", "cifar", "imagenet", "inaturalist"))
        assert load_config(f"recipes/{path.stem}", []).optimizer.nesterov == own
        if own and path.stem.startswith("cifar"):
            assert "a recipe of this project" in path.read_text()
        assert own or path.stem.replace("cifar10_", "cifar100_") in FIGURES


@pytest.fixture(scope="module")
def small_cifar(tmp_path_factory, photos):
    """Ten classes of 120 training and 3 test images, 32 pixels wide, from photographs."""
    root, random = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    image = Image.open(photos[0]).convert("RGB")
    for label in range(10):
        for split, count in (("train", 120), ("test", 3)):
            (root / split / str(label)).mkdir(parents=True)
            for number in range(count):
                left, top = random.integers(0, 600), random.integers(0, 390)
                image.crop((left, top, left + 32, top + 32)).save(root / split / str(label) / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def small_cifar100(small_cifar, tmp_path_factory):
    """A hundred classes, of the ten's images: 115 for training and 3 for testing each."""
    root, random = tmp_path_factory.mktemp("small100"), np.random.default_rng(0)
    for split, count in (("train", 115), ("test", 3)):
        for label in range(100):
            (root / split / f"{label:02}").mkdir(parents=True)
            images = sorted((small_cifar / split / str(label % 10)).iterdir())
            for number, chosen in enumerate(random.permutation(len(images))[:count]):
                shutil.copy(images[chosen], root / split / f"{label:02}" / f"{number}.png")
    return root


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("table", TABLES)
def test_every_row_runs(table, small_cifar, small_cifar100, tmp_path):
    """Every method, λ, length and change of the recipe, on every data set, from images to the table."""
    command = [table, "--budget", "smoke"]
    command += ["--cifar10", str(small_cifar), "--cifar100", str(small_cifar100), "--imagenet", str(small_cifar)]
    command += [part for name in ("prepared", "runs", "docs") for part in (f"--{name}", str(tmp_path / name))]
    done = in_process(reproduce.main, *command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runs"] == found["of"] == len(cells(table, "smoke", 1, 0.1 if table in ON_VALIDATION else 0.0))
    lines = reproduce_report.read(tmp_path / "docs" / f"{table}-smoke.jsonl")
    assert all(0 <= entry["last"]["overall"] <= 1 for entry in lines)


def test_smoke(small_cifar, tmp_path):
    command = ["cifar10_lt", "--budget", "smoke", "--methods", "CE", "Hybrid-SC"]
    places = ["--cifar10", str(small_cifar)]
    places += [part for name in ("prepared", "runs", "docs") for part in (f"--{name}", str(tmp_path / name))]
    done = in_process(reproduce.main, *command, *places)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["runs"], found["of"]) == (2, 11)
    lines = reproduce_report.read(tmp_path / "docs" / "cifar10_lt-smoke.jsonl")
    assert {line["value"] for line in lines} == {"CE", "Hybrid-SC"}
    assert str(tmp_path) not in (tmp_path / "docs" / "cifar10_lt-smoke.jsonl").read_text()
    for line in lines:
        name = {"CE": "ce", "Hybrid-SC": "hybrid"}[line["value"]]
        assert line["command"].startswith(
            f"python -m cibl_ray.train recipes/{name}_cifar10_lt --data.source.kind folder --data.source.path FOLDER"
        )
        assert 0 <= line["last"]["overall"] <= 1
        assert line["machine"]["torch"]
        # ResNet-20: .27 million parameters, 41 million multiply-adds. Hybrid's classifier has a view of its own.
        views = {"CE": 1, "Hybrid-SC": 3}[line["value"]]
        steps = line["passes"] // (64 * views)
        assert (line["passes"], line["forward_passes"]) == (steps * 64 * views, 0)
        assert steps == 248 // 64
        assert (line["parameters"], round(line["multiply_adds"] / 1e6)) == (269_722, 41)
        assert line["pflop"] == round(6 * line["multiply_adds"] * line["passes"] / 1e15, 4)
    text = (tmp_path / "docs" / "cifar10_lt-smoke.md").read_text()
    assert text.index("| CE |") < text.index("| Hybrid-SC |")
    assert "no published number" in text
    assert (tmp_path / "docs" / "cifar10_lt-smoke-cifar10-if100.png").stat().st_size > 5000
    # Again: nothing is trained twice.
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("result.json"))]
    assert len(before) == 2
    again = in_process(reproduce.main, *command, *places)
    assert again.returncode == 0, again.stderr
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("result.json"))] == before
    assert reproduce_report.read(tmp_path / "docs" / "cifar10_lt-smoke.jsonl") == lines
    # Images from another kind of source are not these.
    lines_file = tmp_path / "docs" / "cifar10_lt-smoke.jsonl"
    lines_file.write_text("".join(json.dumps(entry | {"source": "cifar10"}) + "\n" for entry in lines))
    mixed = in_process(reproduce.main, *command, *places)
    assert mixed.returncode == 2
    assert "of images from 'cifar10', this command reads 'folder': choose another --docs" in mixed.stderr
    # Another recipe under the same name is neither taken for this one's result nor written over.
    assert all(entry["wall_seconds"] > entry["seconds"] > 0 for entry in lines)
    another = {**lines[0]["config"], "seed": 7}
    old = [entry if entry["value"] != "CE" else entry | {"config": another} for entry in lines]
    lines_file.write_text("".join(json.dumps(entry) + "\n" for entry in old))
    path = next((tmp_path / "runs").rglob("*CE-0/config.yaml"))
    text = path.read_text()
    path.write_text(text.replace("weight_decay: 0.0002", "weight_decay: 0.3"))
    changed = in_process(reproduce.main, *command, *places)
    assert changed.returncode == 2
    assert "holds a run of another configuration (optimizer differ): remove it" in changed.stderr
    path.write_text(text)
    mended = in_process(reproduce.main, *command, *places)
    assert mended.returncode == 0, mended.stderr
    assert [entry["config"] for entry in reproduce_report.read(lines_file)] == [entry["config"] for entry in lines]
    # The table is drawn of all lines, whichever rows are asked for; and of none whose recipe is another by now.
    stale = [entry if entry["value"] != "CE" else entry | {"config": another} for entry in lines]
    lines_file.write_text("".join(json.dumps(entry) + "\n" for entry in stale) + '{"table": "cifar10_lt", "bud')
    drawn = in_process(reproduce.main, *command[:-1], *places, "--report-only")
    assert drawn.returncode == 0, drawn.stderr
    text = (tmp_path / "docs" / "cifar10_lt-smoke.md").read_text()
    assert "1 of 11 runs" in text
    assert "| Hybrid-SC |" in text
    assert "| CE |" not in text
    wrong = in_process(reproduce.main, *command[:-2], "Nonsense", *places)
    assert wrong.returncode == 2
    assert "no row 'Nonsense'; there are: BCL, CE" in wrong.stderr
    # The best epoch on validation, in a table of its own.
    best = in_process(reproduce.main, *command[:-1], *places, "--val", "0.1")
    assert best.returncode == 0, best.stderr
    (entry,) = reproduce_report.read(tmp_path / "docs" / "cifar10_lt-smoke-val.jsonl")
    assert entry["best"]["epoch"] == 1
    assert "| best on validation |" in (tmp_path / "docs" / "cifar10_lt-smoke-val.md").read_text()


def test_smoke_of_imagenet(small_cifar, tmp_path):
    """ResNet-50 under its recipe, from any image folder."""
    command = ["imagenet_lt", "--methods", "BCL", "--imagenet", str(small_cifar)]
    command += [part for name in ("prepared", "runs", "docs") for part in (f"--{name}", str(tmp_path / name))]
    done = in_process(reproduce.main, *command, "--budget", "smoke")
    assert done.returncode == 0, done.stderr
    (entry,) = reproduce_report.read(tmp_path / "docs" / "imagenet_lt-smoke.jsonl")
    where = "--data.source.kind folder --data.source.path FOLDER"
    assert entry["command"].startswith(f"python -m cibl_ray.train recipes/bcl_imagenet_lt {where}")
    assert entry["config"]["network"]["backbone"] == "resnet50"
    assert "`--imagenet FOLDER`" in (tmp_path / "docs" / "imagenet_lt-smoke.md").read_text()
    refused = in_process(reproduce.main, *command, "--budget", "cpu")
    assert refused.returncode == 2
    assert refused.stderr.endswith("it has the budgets gpu and smoke\n")


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
    # A run that would not end in time is not begun: of two, the one with less work is.
    late, small = (
        replace(every[1], name=name, options=(*every[1].options, "--seed", seed)) for name, seed in (("b", "1"), ("s", "2"))
    )
    begun = []
    kept = run_all(
        [late, small], tmp_path / "runs", 1, lambda run, seconds: begun.append(run.name), 1000,
        lambda config: {1: 100.0, 2: 1.0}[config.seed], pace=11.0,
    )  # fmt: skip
    assert (begun, kept) == (["s"], ["b"])
    assert not (tmp_path / "runs" / "b").exists()
    # No time left: nothing is begun; and what has a result is not run again.
    run_all(every[1:], tmp_path / "runs", 1, lambda run, seconds: took.clear())
    assert run_all([replace(every[1], name="late")], tmp_path / "runs", 1, seconds=-1) == ["late"]
    assert list(took) == ["good"]
    assert not (tmp_path / "runs" / "late").exists()
    # What was killed before its configuration was written begins again.
    (tmp_path / "runs" / "s2").mkdir()
    (tmp_path / "runs" / "s2" / ".lock").touch()
    assert run_all([replace(small, name="s2")], tmp_path / "runs", 1) == []
    assert (tmp_path / "runs" / "s2" / "result.json").exists()


def test_runs_end_with_the_command_that_is_asked_to_stop(small_cifar, tmp_path):
    """A scheduler's SIGTERM reaches the command alone: no run may go on without it. Each can be resumed."""
    place = ("--data.source.kind", "folder", "--data.source.path", str(small_cifar), "--prepared", str(tmp_path / "prepared"))
    run = Run("long", "cifar10_lt", (*place, "--epochs", "10000", "--backbone", "resnet20", "--batch_size", "32"))

    def ask():
        for _ in range(2000):
            if read_metrics(tmp_path / "runs" / "long"):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.1)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Interrupted):
        run_all([run], tmp_path / "runs", 1)
    assert (tmp_path / "runs" / "long" / "checkpoints" / "last.safetensors").exists()
    assert not [child for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())]


def test_a_gpu_sessions_archive_holds_all_that_its_steps_read(small_cifar100, tmp_path, capsys):
    """On a machine without the images, every configuration of the session finds its data as they were prepared."""
    archive = tmp_path / "data.tar.xz"
    assert gpu_session.pack(small_cifar100, archive, "smoke", tmp_path / "here", 0) == archive.stat().st_size < 20e6
    gpu_session.unpack(archive, tmp_path / "there")
    options = gpu_session.data_options("smoke")
    assert len(options) == 13  # eleven rows, the step's benchmark, the quick whole run
    for config, *flags in options:
        place = ["--data.source.kind", "folder", "--data.source.path", "/cibl-ray-gpu-session/cifar100"]
        loaded = load_config(config, [*flags, *place, "--prepared", str(tmp_path / "there")])
        prepared = ensure_prepared(loaded.data, loaded.seed)
        assert prepared.folder.parent == tmp_path / "there"
        assert len(prepared.classes) == 100
    assert "the source is not on this machine" in capsys.readouterr().err


def test_a_step_that_does_not_end_takes_its_own_processes_along(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_session, "LEAST", 0.0)
    monkeypatch.setattr(gpu_session, "_GRACE", 0.1)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    session = gpu_session.Session(tmp_path, 60.0)
    found = session.step("stuck", "-c", code, most=3.0)
    assert (found["exit"], found["step"]) == (None, "stuck")
    child, until = int((tmp_path / "child").read_text()), time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_gpu_sessions_tests_need_no_more_than_it_asks_for(tmp_path):
    """Neither Ray and FFCV, nor what exporting, serving, data sources and other tests need."""
    names = "ray ffcv optuna onnx onnxruntime starlette uvicorn pyarrow fsspec aiohttp datasets hypothesis moto torchmetrics"
    (tmp_path / "without.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names.split()}))\n")
    options = ["--collect-only", "-q", "-m", "gpu", "-p", "without", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *gpu_session.GPU_TESTS], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    mark = "pytest.mark." + "gpu"  # in two parts, so that this file is not found
    marked = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if mark in path.read_text()]
    assert {str(path.relative_to(REPOSITORY)) for path in marked} == {*gpu_session.GPU_TESTS}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_whole_gpu_session_in_small(small_cifar100, tmp_path):
    """The script, from the archive to a table's lines, on a machine without a GPU: its tests are skipped, the rest runs."""
    archive, out = tmp_path / "data.tar.xz", tmp_path / "out"
    gpu_session.pack(small_cifar100, archive, "smoke", tmp_path / "here", 0)
    command = [
        "sh",
        "scripts/gpu_session.sh",
        "run",
        archive,
        "--budget",
        "smoke",
        "--minutes",
        "40",
        "--jobs",
        "2",
        "--out",
        out,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [result["step"] for result in results] == ["tests", "losses", "step", "whole_run", "table"]
    assert {result["exit"] for result in results} == {0}, results
    assert results[-1]["result"]["runs"] == 2
    lines = reproduce_report.read(out / "cifar100_lt-smoke.jsonl")
    assert {line["value"] for line in lines} == {"CE", "VS"}


def test_the_pace_of_a_run_that_pastes_images(small_cifar100, tmp_path):
    place = ["--data.source.kind", "folder", "--data.source.path", str(small_cifar100), "--prepared", str(tmp_path)]
    fewer = ["--backbone", "resnet20", "--batch_size", "16", "--loader.kind", "resident"]
    config = load_config("cifar100_lt", [*place, "--loss.kind", "cross_entropy", "--train.cmo", "{}", *fewer])
    assert 0 < seconds_a_pass(resolve(config)) < 10


def test_a_gpu_sessions_steps_have_limits_and_leave_lines(tmp_path, capsys, monkeypatch):
    session = gpu_session.Session(tmp_path, 60)
    assert session.step("good", "-c", "print('x'); print('{\"a\": 1}')")["result"] == {"a": 1}
    assert session.step("bad", "-c", "raise SystemExit('error: no')")["last_line"] == "error: no"
    monkeypatch.setattr(gpu_session, "LEAST", 1)
    slow = session.step("slow", "-c", "import time; print('begun', flush=True); time.sleep(100)", most=2)
    assert slow["exit"] is None
    assert slow["seconds"] < 60
    session.ends = 0.0
    assert session.step("late", "-c", "1")["skipped"] == "no time left"
    lines = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == session.results
    assert [entry["step"] for entry in lines] == ["good", "bad", "slow", "late"]
    assert "== slow: at most" in capsys.readouterr().out


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
    every = [cell for cell in cells("cifar100_lt", "gpu", 3, 0.0) if cell.imbalance != 10]
    reproduce_report.write(tmp_path / "t.jsonl", lines, every)
    text = (tmp_path / "t.md").read_text()
    absent = ", ".join(
        dict.fromkeys(f"`{cell.value}`" for cell in every if cell.value not in ("Hybrid-SC", "CIBL, cosine head"))
    )
    assert f"4 of {len(every)} runs (not run yet: CIFAR-100-LT at 100: {absent}; CIFAR-100-LT at 50). Accuracy" in text
    assert "| Hybrid-SC | 47.0 ± 1.0 (3) |" in text
    row = next(row for row in text.splitlines() if row.startswith("| Hybrid-SC"))
    assert row.endswith("| 50.0 ± 0.0 (3) | 46.7 | +0.3 | 1.5 |")
    assert "| – | – | – | 1.5 |" in next(row for row in text.splitlines() if row.startswith("| CIBL"))  # neither is published
    assert "H100, torch 2. Code: commit abc." in text
    assert "ProCo's: 54.2, in 400 epochs" in text
    assert "†: the best epoch on the test set" in text
    assert "Images of each class: this project's draw" in text
    reproduce_report.write(tmp_path / "b.jsonl", [line("BCL", 0, 0.5)], [])
    assert "| 53.9 † | -3.9 |" in (tmp_path / "b.md").read_text()
    assert "made alike" not in text
    assert reproduce_report.means(lines)["cifar100 IF 100 Hybrid-SC"] == {"mean": 47.0, "spread": 1.0, "seeds": 3}


def test_what_one_change_of_the_base_moves_stands_in_the_table(tmp_path):
    lines = [line("base", 0, 0.4), line("CMO", 0, 0.37), line("SAM", 0, 0.45)]
    lines[2] |= {"passes": 400_000, "forward_passes": 30_000}
    reproduce_report.write(tmp_path / "s.jsonl", lines, [])
    rows = [row for row in (tmp_path / "s.md").read_text().splitlines() if row.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| SAM", "| base", "| CMO"]  # by accuracy
    assert [row.split(" | ")[-3:-1] for row in rows] == [["+5.0", "0.41"], ["+0.0", "–"], ["-3.0", "–"]]


def test_runs_of_other_images_precision_or_machines_are_named(tmp_path):
    lines = [line("CE", seed, 0.4) | {"precision": "bf16"} for seed in range(2)]
    lines += [line("BCL", 0, 0.5) | {"precision": "fp32"}, line("BCL", 1, 0.5) | {"precision": "bf16"}]
    reproduce_report.write(tmp_path / "t.jsonl", lines, [])
    text = (tmp_path / "t.md").read_text()
    assert "- precision bf16: CE, BCL (seed 1)\n- precision fp32: BCL (seed 0)\n" in text
    for entry in lines:
        entry["precision"] = "bf16"
    lines[0]["data"] = {"test": "f" * 64}
    reproduce_report.write(tmp_path / "t.jsonl", lines, [])
    assert "- test images ffffffffffff: CE (seed 0)\n" in (tmp_path / "t.md").read_text()


def test_a_seed_that_failed_stands_in_the_table(tmp_path):
    every = [cell for cell in cells("cifar100_lt", "gpu", 2, 0.0) if (cell.imbalance, cell.value) == (100, "CE")]
    cell = every[1]
    lost = failed(cell, "cifar100_lt", "gpu", load_config(cell.config, list(cell.options)), "the loss is not finite")
    reproduce_report.write(tmp_path / "t.jsonl", [line("CE", 0, 0.4), lost], every)
    text = (tmp_path / "t.md").read_text()
    assert "1 of 2 runs. Accuracy" in text
    assert "**Failed: CE, seed 1: the loss is not finite**" in text


def test_a_commit_is_that_of_the_code_that_trained(tmp_path, monkeypatch):
    cell = cells("cifar10_lt", "cpu", 1, 0.0)[0]
    save_config(load_config(cell.config, list(cell.options)), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text("")
    result = {"last": {"epoch": 3, "scores": {}}, "hardware": "CPU", "loader": "x", "data": {}, "seconds": 1, "images_per_s": 1}
    monkeypatch.setattr(reproduce_lines, "commit", lambda: "abc")
    for code, of in (([code_digest()], "abc"), ([code_digest(), "other"], None)):
        (tmp_path / "result.json").write_text(json.dumps({**result, "code": code}))
        assert record(cell, tmp_path, "cifar10_lt", "cpu", jobs=2)["commit"] == of


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert reproduce_lines.commit() is None


def test_passes_are_counted_by_view_and_stream():
    def of(*flags, batches=10):
        found = passes(load_config("quickstart", ["--epochs", "4", "--batch_size", "32", *flags]), batches)
        return found.trained, found.forward, found.equivalent

    images = 10 * 32 * 4
    assert of() == (2 * images, 0, 2 * images)
    assert of("--data.views", "[{}]") == (images, 0, images)
    assert of("--loss", "{kind: paco}") == (images, images, pytest.approx(images * 4 / 3))
    assert of("--loss", "{kind: hybrid_sc}") == (3 * images, 0, 3 * images)
    assert of("--train.tune", "head") == (0, 0, 0)
    late = ("--loss", "{kind: cibl, queue: 64}", "--train.views_from", "0.6")  # from the fourth epoch on
    assert of(*late)[0] == (3 * 1 + 1 * 2) * images / 4
    # With SAM from epoch 2 on, two passes a view of one view, then two of two.
    assert of(*late, "--optimizer.sam", "{from: 0.5}")[0] == (2 * 1 + 1 * 2 * 1 + 1 * 2 * 2) * images / 4
    assert passes(load_config("quickstart", ["--epochs", "4", "--batch_size", "32", *late]), 10, 2).trained == 2 * images / 4
    # A full-length run of cross-entropy is .9 PFLOP, as the 2.17 million passes of .41 GFLOP that it makes.
    config = load_config("recipes/ce_cifar100_lt", [])
    whole = passes(config, 10_847 // 128)
    assert whole.trained == 200 * 84 * 128
    work = multiply_adds(config, 100)
    assert work == pytest.approx(69e6, rel=0.01)
    assert pflop(whole, work) == pytest.approx(0.89, abs=0.01)


def test_accuracy_against_pflop_is_drawn(tmp_path, capsys):
    lines = [line("CIBL, cosine head", 0, 0.47) | {"pflop": 0.9}, line("VS", 0, 0.46) | {"pflop": 0.9}, line("CE", 0, 0.38)]
    lines += [line("BCL", 0, 0.5, table="recipe") | {"pflop": 0.5}]
    for entry in lines:
        reproduce_report.add(tmp_path / "t.jsonl", entry)
    done = in_process(front.main, str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "front.png"))
    assert done.returncode == 0, done.stderr
    assert "2 runs" in done.stdout  # of the test set, and with a cost
    assert (tmp_path / "front.png").stat().st_size > 20_000
    assert front.ours(lines, "cifar100", 100) == {
        "CIBL, cosine head": [(0.9, pytest.approx(47))],
        "VS": [(0.9, pytest.approx(46))],
    }
    points = {name: (round(x, 1), y) for name, x, y in front.published("cifar100", 100)}
    assert points["CE"] == (0.9, 38.3)
    assert points["Hybrid-SC"] == (2.7, 46.72)
    assert points["PaCo †"] == (2.4, 52.0)
    assert points["balanced softmax"] == (2.8, 50.3)  # 13,000 steps of 512 images
    missing = in_process(front.main, str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "x.png"), "--factor", "10")
    assert missing.returncode == 2
    assert "at imbalance factor 10 has a cost" in missing.stderr


def test_names_of_points_at_one_height_are_drawn_apart():
    assert front._apart([32.6, 46.2, 46.8, 46.9], 0.75) == pytest.approx([32.6, 46.2, 46.95, 47.7])


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
    for cell in cells("imagenet_lt", "gpu", 1, 0.0):
        if cell.value == "CIBL, cosine head":
            trained = load_config(cell.config, list(cell.options))
            assert computed(load_config("recipes/imagenet_lt_90", [])) == computed(trained)
            assert (trained.loss.kind, trained.loss.kappa) == ("cibl", 1)
    for dataset in ("cifar10", "cifar100"):
        for cell in cells(f"{dataset}_lt", "gpu", 1, 0.0):
            if cell.value == "CIBL, cosine head":
                shipped = load_config(f"recipes/{dataset}_lt_if{cell.imbalance}_200", [])
                assert computed(shipped) == computed(load_config(cell.config, list(cell.options)))


def test_a_line_counts_while_its_cell_computes_the_same():
    cell = cells("cifar10_lt", "cpu", 1, 0.0)[-1]
    config = load_config(cell.config, list(cell.options))
    entry = of_cell(cell, "cifar10_lt", "cpu", config)
    assert config.loss.kind == "cibl"
    assert is_of(entry, config)
    assert not is_of(entry, config.model_copy(update={"seed": 7}))
    elsewhere = ["--data.source.kind", "folder", "--data.source.path", "x", "--train.precision", "fp32"]
    assert is_of(entry, load_config(cell.config, [*cell.options, *elsewhere]))
    # A field that has come since has its default; one that is no more, or whose default has changed, is a difference.
    older = {**entry, "config": {**entry["config"], "loss": dict(entry["config"]["loss"])}}
    assert older["config"]["loss"].pop("normalize") == "none"
    assert is_of(older, config)
    older["config"]["loss"]["gone"] = 1
    assert not is_of(older, config)
    changed = config.model_copy(update={"loss": config.loss.model_copy(update={"temperature": 0.05})})
    assert not is_of(entry, changed)
