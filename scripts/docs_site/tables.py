"""`python -m scripts.docs_site.tables [--check]`: draw the tables of docs/ and README from the recorded JSON lines.

A table stands between `<!-- table NAME -->` and `<!-- /table -->`. Numbers in sentences are listed in QUOTES. With --check
nothing is written, and what is stale is an error. `make tables` runs it.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.reproduce.__main__ import main as reproduce
from benchmarks.reproduce.cells import BUDGETS, ON_VALIDATION, cells
from benchmarks.reproduce.lines import is_of
from cibl_ray.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
SHORT_RUNS = "lab-notes/short-runs"
_TABLE = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- /table -->)", re.DOTALL)
Line = dict[str, Any]


def read(name: str) -> list[Line]:
    """The JSON lines of a file in docs/."""
    return [json.loads(line) for line in (DOCS / name).read_text().splitlines()]


def cell(values: Sequence[float | None], digits: int = 1) -> str:
    """Shares as percent: the mean, and the deviation where there are several."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["|" + "|".join(f" {text} " if text else " " for text in row) + "|" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


# The measured effect of a loss


def effect(method: str) -> str:
    """A method beside cross-entropy on both CIFAR-LT tables of the budget cpu."""
    columns = ("overall", "head", "middle", "tail")
    rows = []
    for table, title in (("cifar10_lt", "CIFAR-10-LT"), ("cifar100_lt", "CIFAR-100-LT")):
        lines = _current(table, "cpu", f"{SHORT_RUNS}/{table}-cpu.jsonl")
        for name in dict.fromkeys(("CE", method)):
            of = [line["last"] for line in lines if line["value"] == name]
            rows.append([title, name, *(cell([line[column] for line in of]) for column in columns), str(len(of))])
    return markdown(["", "", "overall", "head third", "middle third", "tail third", "seeds"], rows)


@functools.cache
def _current(table: str, budget: str, name: str) -> list[Line]:
    """The lines of a table whose runs ended, and that say what its cells train today."""
    lines = read(name)
    seeds = 1 + max((line["seed"] for line in lines), default=0)
    share = 0.1 if table in ON_VALIDATION else 0.0
    every = {(one.dataset, one.imbalance, one.value, one.seed): one for one in cells(table, budget, seeds, share)}
    found = {}
    for line in lines:
        key = (line["dataset"], line["imbalance"], line["value"], line["seed"])
        one = every.get(key)
        if one is not None and "failed" not in line and is_of(line, load_config(one.config, [*one.options, *_FOLDER])):
            found[key] = line
    return list(found.values())


_FOLDER = ("--data.source.kind", "folder", "--data.source.path", "FOLDER")


def photos_effect(loss: str) -> str:
    """A loss beside cross-entropy as the head of pretrained features."""
    columns = ("overall", "many", "medium", "few", "worst", "calibration_error")
    lines, rows = read("results/photos-cpu.jsonl"), []
    for head in ("linear", "cosine"):
        for name in dict.fromkeys(("cross-entropy", loss)):
            of = [line for line in lines if line["row"] == f"head, {name}, {head}"]
            rows.append([f"{name}, {head} head", *(cell([line[column] for line in of]) for column in columns), str(len(of))])
    return markdown(["", *(column.replace("_", " ") for column in columns), "seeds"], rows)


def recipe(method: str) -> str:
    """What `benchmarks.reproduce` trains a method with, by data set and imbalance factor."""
    rows = []
    for table, title in (("cifar10_lt", "CIFAR-10-LT"), ("cifar100_lt", "CIFAR-100-LT"), ("imagenet_lt", "ImageNet-LT")):
        for one in cells(table, "gpu", 1, 0):
            if one.value != method or one.imbalance not in (0, BUDGETS["gpu"].factors[0]):
                continue
            config = load_config(one.config, list(one.options))
            loss = config.loss.model_dump(mode="json", exclude_defaults=True)
            fields = ", ".join(f"{name} {value}" for name, value in loss.items() if name != "kind")
            factor = f", factor {one.imbalance}" if one.imbalance else ""
            rate = f"{config.optimizer.lr:g}"
            rows.append([title + factor, fields or "defaults", str(config.train.epochs), str(config.train.batch_size), rate])
    return markdown(["data set", "fields of the loss", "epochs", "batch", "learning rate"], rows)


# Results


def photos() -> str:
    """Every row of the comparison on photographs."""
    from benchmarks.photos_table import markdown as table

    return table(read("results/photos-cpu.jsonl"))


def cibl_vs_ce(form: str = "") -> str:
    """CIBL beside cross-entropy; the better mean is bold where it is ahead by more than both deviations.

    Args:
        form: 'short' has the README's columns.
    """
    names = ["overall", "many", "medium", "few", "head", "middle", "tail", "worst", "calibration_error"]
    titles = ["overall", "many (8 classes)", "medium (2)", "few (0)", "3 largest", "4 middle", "3 smallest", "worst class"]
    titles.append("calibration error")
    if form == "short":
        names = ["overall", "head", "tail", "worst", "calibration_error"]
        titles = ["overall", "3 largest classes", "3 smallest", "worst class", "calibration error"]
    lines = read("results/cibl_vs_ce/cpu.jsonl")
    rows = []
    for line in lines:
        texts = [line["value"]]
        for name in names:
            score = line["scores"][name]
            if score is None:
                texts.append("–")
                continue
            others = [other["scores"][name] for other in lines if other is not line]
            sign = -1 if name == "calibration_error" else 1
            clear = all(sign * (score[0] - other[0]) > max(score[1], other[1]) for other in others)
            text = f"{100 * score[0]:.1f} ± {100 * score[1]:.1f}"
            texts.append(f"**{text}**" if clear else text)
        rows.append(texts)
    return markdown(["", *titles], rows)


def equal_cost(method: str = "") -> str:
    """Methods on CIFAR-100-LT after as many passes, the best overall first; the best of each column is bold.

    Args:
        method: Its rows alone, beside cross-entropy's; '' has every row.
    """
    columns = ("overall", "many", "medium", "few")
    rows: dict[str, list[Line]] = {}
    for line in _current("equal_cost", "laptop", "results/equal_cost-laptop.jsonl"):
        wanted = not method or line["value"].split(",")[0] in ("CE", method)
        if line["dataset"] == "cifar100" and wanted:
            rows.setdefault(line["value"], []).append(line["last"])
    means = {row: [statistics.mean(scores[column] for scores in of) for column in columns] for row, of in rows.items()}
    best = [max(column) for column in zip(*means.values(), strict=True)]
    drawn = []
    for row in sorted(rows, key=lambda row: -means[row][0]):
        texts = [cell([scores[column] for scores in rows[row]]) for column in columns]
        bold = [
            f"**{text}**" if mean == top and len(rows) > 1 else text
            for text, mean, top in zip(texts, means[row], best, strict=True)
        ]
        drawn.append([row, *bold])
    return markdown(["", *columns], drawn)


def search() -> str:
    """What each change of the short recipe moves on validation images, in points, the best first."""
    columns = ("overall", "many", "medium", "few")
    rows: dict[str, list[dict[str, float]]] = {}
    passes = {}
    for line in _current("search", "laptop", "results/search-laptop.jsonl"):
        rows.setdefault(line["value"], []).append(line["last"])
        passes[line["value"]] = f"{(line['passes'] + line['forward_passes'] / 3) / 1e6:.2f}"
    means = {
        row: {column: 100 * statistics.mean(scores[column] for scores in of) for column in columns} for row, of in rows.items()
    }
    base = means.pop("base")
    drawn = [["base, %", *(f"{base[column]:.1f}" for column in columns), passes["base"]]]
    drawn += [
        [row, *(f"{means[row][column] - base[column]:+z.1f}" for column in columns), passes[row]]
        for row in sorted(means, key=lambda row: -means[row]["overall"])
    ]
    return markdown(["change", *columns, "M passes"], drawn)


def measured(name: str) -> str:
    """A table of a benchmark as it was recorded in measured.jsonl."""
    (line,) = [line for line in read("results/measured.jsonl") if line["table"] == name]
    return markdown(line["columns"], line["rows"])


def quote(table: str, row: str, column: str) -> str:
    """One cell of a recorded table, without its bold type."""
    (line,) = [line for line in read("results/measured.jsonl") if line["table"] == table]
    (cells_of,) = [cells for cells in line["rows"] if cells[0].replace("*", "") == row]
    return str(cells_of[line["columns"].index(column)]).replace("*", "")


def schema(name: str) -> str:
    """The fields of a JSON file, from its schema."""
    content = json.loads((DOCS / "reference" / "schemas" / f"{name}.schema.json").read_text())
    rows = []
    for field, about in content["properties"].items():
        optional = "" if field in content["required"] else ", may be absent"
        kind = about.get("type") or ("text" if "enum" in about else "whole number")
        words = {"string": "text", "integer": "whole number", "array": "list"}
        rows.append([f"`{field}`", words.get(kind, kind) + optional, about.get("description", "")])
    return markdown(["field", "type", ""], rows)


MAKERS: dict[str, Callable[..., str]] = {
    "cibl_vs_ce": cibl_vs_ce,
    "effect": effect,
    "equal_cost": equal_cost,
    "measured": measured,
    "photos": photos,
    "photos-effect": photos_effect,
    "recipe": recipe,
    "schema": schema,
    "search": search,
}
# Numbers in sentences: the file, the sentence with {} for the number, and where the number is recorded.
QUOTES: list[tuple[str, str, tuple[str, str, str]]] = [
    ("README.md", "the loader is {} times as fast as torchvision's DataLoader", ("cifar_loader", "FFCV loader", "ratio")),
]


def redrawn(text: str) -> str:
    """A page with each of its tables drawn again."""

    def draw(match: re.Match[str]) -> str:
        name, _, argument = match[2].partition(" ")
        return f"{match[1]}{MAKERS[name](*([argument] if argument else []))}\n{match[3]}"

    return _TABLE.sub(draw, text)


def requoted(path: str, text: str) -> str:
    """A page with each of its quoted numbers as it is recorded."""
    for file, sentence, source in QUOTES:
        if file != path:
            continue
        before, _, after = sentence.partition("{}")
        pattern = re.compile(f"({re.escape(before)})[^ ]+?({re.escape(after)})")
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{path}: the sentence {sentence!r} is not there once; mend QUOTES")
        text = pattern.sub(rf"\g<1>{quote(*source)}\g<2>", text)
    return text


def stale_pages() -> dict[Path, str]:
    """The pages whose tables or numbers are not those of the recorded lines, with what they should say."""
    found = {}
    for path in [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = path.read_text()
        new = requoted(str(path.relative_to(REPOSITORY)), redrawn(text))
        if new != text:
            found[path] = new
    return found | _reproduced()


def _reproduced() -> dict[Path, str]:
    """The stale ones among the tables of `benchmarks.reproduce`."""
    found = {}
    for lines in sorted([*DOCS.glob("results/*-*.jsonl"), *DOCS.glob(f"{SHORT_RUNS}/*-*.jsonl")]):
        table, _, budget = lines.stem.rpartition("-")
        if table == "photos":
            continue
        seeds = str(1 + max(line["seed"] for line in read(str(lines.relative_to(DOCS)))))
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(lines, folder)
            command = ["reproduce", table, "--budget", budget, "--seeds", seeds, "--report-only", "--docs", folder]
            with patch.object(sys, "argv", command), patch("benchmarks.reproduce.report._picture"), patch("builtins.print"):
                reproduce()
            new = (Path(folder) / f"{lines.stem}.md").read_text()
        path = lines.with_suffix(".md")
        if new != path.read_text():
            found[path] = new
    return found


def main() -> None:
    """Draw the tables, or check them."""
    parser = argparse.ArgumentParser(prog="python -m scripts.docs_site.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page is stale")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # of configurations whose batch size is not their recipe's
    stale = stale_pages()
    for path, text in stale.items():
        print(f"{'stale' if arguments.check else 'written'}: {shlex.quote(str(path.relative_to(REPOSITORY)))}")
        if not arguments.check:
            path.write_text(text)
    sys.exit(bool(stale) and arguments.check)


if __name__ == "__main__":
    main()
