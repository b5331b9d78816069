"""`docs/results/`: lines of JSON, and the tables and pictures drawn from them."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.reproduce_cells import BEST_PUBLISHED, PUBLISHED, Cell

TITLES = {"cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT", "imagenet": "ImageNet-LT"}
COLUMNS = ("overall", "many", "medium", "few", "head", "middle", "tail")
COLORS = {"overall": "black", "head": "#2a6f97", "middle": "#8a8a8a", "tail": "#c8553d"}
Line = dict[str, Any]
_SCORED = {"recipe": "a balanced validation split, a tenth of each class's images before the long tail is cut"}
_lock = Lock()


def key(line: Line) -> tuple[str, int, str, int]:
    return line["dataset"], line["imbalance"], line["value"], line["seed"]


def row(cell: Cell) -> tuple[str, int, str]:
    """The row of a cell: `key` without the seed."""
    return cell.dataset, cell.imbalance, cell.value


def read(path: Path) -> list[Line]:
    """The lines of a file, the last of each cell; one that a full disk or a power cut left unfinished counts as absent."""
    found: dict[tuple[str, int, str, int], Line] = {}
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[key(line)] = line
    return list(found.values())


def add(path: Path, line: Line) -> None:
    """Append one line, whole."""
    with _lock:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" * unfinished + json.dumps(line, ensure_ascii=False) + "\n")


def groups(lines: list[Line]) -> dict[tuple[str, int], dict[str, list[Line]]]:
    """(data set, imbalance factor) -> row -> its seeds' lines, in the order of first appearance."""
    found: dict[tuple[str, int], dict[str, list[Line]]] = {}
    for line in lines:
        found.setdefault((line["dataset"], line["imbalance"]), {}).setdefault(line["value"], []).append(line)
    return found


def means(lines: list[Line]) -> dict[str, float]:
    return {
        f"{dataset} IF {factor} {value}": round(100 * float(np.mean([line["last"]["overall"] for line in of])), 2)
        for (dataset, factor), rows in groups(lines).items()
        for value, of in rows.items()
    }


def write(path: Path, lines: list[Line], of: int) -> None:
    """`path` with the suffix .md, and a picture for each data set and factor."""
    first = lines[0]
    text = [
        f"# {first['table']}, budget `{first['budget']}`",
        "",
        f"{len(lines)} of {of} runs. Accuracy on {_SCORED.get(first['table'], 'the balanced test set')}, %, last epoch: mean ± "
        "deviation over seeds (how many).",
        "Nothing was chosen on the test set. many, medium, few: classes with more than 100, 20 to 100, fewer than 20 training",
        "images; head, middle, tail: thirds of the classes. CIBL: λ = .05, in the tables of methods and recipes with the "
        "log-prior (κ = 1).",
    ]
    if first["budget"] != "gpu":
        text += ["", "**Short runs of a small network: they compare methods, and no published number.**"]
    for (dataset, factor), rows in groups(lines).items():
        of_methods = first["budget"] == "gpu" and first["table"] in ("cifar10_lt", "cifar100_lt")
        published = PUBLISHED[dataset] if of_methods else {}
        title = TITLES[dataset] + (f", imbalance factor {factor}" if factor else "")
        with_best = any("best" in line for of_row in rows.values() for line in of_row)
        head = ["", *COLUMNS, *(["best on validation"] if with_best else []), *(["published"] if published else []), "minutes"]
        text += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for value, of_row in rows.items():
            cells = [value, *(_cell([line["last"][name] for line in of_row]) for name in COLUMNS)]
            if with_best:
                cells.append(_cell([line["best"]["overall"] for line in of_row if "best" in line]))
            if published:
                number = published.get(value, {}).get(factor)
                cells.append("–" if number is None else f"{number:.1f}")
            # Of the process as a whole, start and evaluation included, where that was taken; else of the epochs alone.
            cells.append(f"{np.mean([line.get('wall_seconds') or line['seconds'] for line in of_row]) / 60:.1f}")
            text.append("| " + " | ".join(cells) + " |")
        picture = path.with_name(f"{path.stem}-{dataset}{f'-if{factor}' if factor else ''}.png")
        _picture(picture, title, rows, {row: of_it.get(factor) for row, of_it in published.items()}, first["table"])
        if of_methods and factor in BEST_PUBLISHED[dataset]:
            text += ["", f"The best published number with this network is ProCo's: {BEST_PUBLISHED[dataset][factor]:.1f}."]
        text += ["", f"![{title}]({picture.name})"]
        mixed = [value for value, of_row in rows.items() if len({_images(line) for line in of_row}) > 1]
        if mixed:
            text += ["", f"**Seeds of other images or another precision stand in one row: {', '.join(mixed)}.**"]
    places = sorted({f"{line['hardware']}, torch {line['machine']['torch']}" for line in lines})
    again = f"{first['table']} --budget {first['budget']} --seeds {1 + max(line['seed'] for line in lines)}"
    again += (" --val SHARE" if "-val" in path.stem else "") + (" --compile" if path.stem.endswith("-compiled") else "")
    text += [
        "",
        f"Machine: {'; '.join(places)}. Commit: {', '.join(sorted({str(line['commit']) for line in lines}))}.",
        "",
        f"Every run's command, scores and machine: [{path.name}]({path.name}). All of it again: "
        f"`python -m benchmarks.reproduce {again}`, with image folders `--cifar10 FOLDER --cifar100 FOLDER`.",
    ]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def _images(line: Line) -> tuple[Any, ...]:
    """What seeds of one row must share: the kind of source, the test images, and the precision."""
    return line.get("source"), (line.get("data") or {}).get("test"), line.get("precision")


def _cell(values: list[float | None]) -> str:
    numbers = 100 * np.array([value for value in values if value is not None])
    if len(numbers) == 0:
        return "–"
    spread = f" ± {numbers.std(ddof=1):.1f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():.1f}{spread} ({len(numbers)})"


def _picture(path: Path, title: str, rows: dict[str, list[Line]], published: dict[str, float | None], table: str) -> None:
    """Means and ranges: rows below one another for methods, along an axis for λ and epochs."""
    figure = Figure(figsize=(7.5, max(4.2, 1.2 + 0.26 * len(rows))), layout="constrained")
    axes = figure.add_subplot()
    values, place = list(rows), np.arange(len(rows))
    by_method = table not in ("tail_skew", "cosine_epochs")
    accuracy = f"{'validation' if table in _SCORED else 'test'} accuracy, %"
    for name, color in COLORS.items():
        columns = [100 * np.array([line["last"][name] for line in rows[value]]) for value in values]
        middle = np.array([column.mean() for column in columns])
        low, high = [column.min() for column in columns], [column.max() for column in columns]
        if by_method:
            axes.hlines(place, low, high, color=color, lw=2, alpha=0.5)
            axes.plot(middle, place, "o", color=color, label=name, ms=5)
        else:
            axes.plot(place, middle, marker="o", color=color, label=name)
            axes.fill_between(place, low, high, color=color, alpha=0.2, lw=0)
    if by_method:
        numbers = [(published[value], y) for value, y in zip(values, place, strict=True) if published.get(value) is not None]
        if numbers:
            axes.plot(*zip(*numbers, strict=True), "D", mfc="none", color="black", ms=8, label="published, overall")
        axes.set_yticks(place, values)
        axes.invert_yaxis()
        axes.set_xlabel(accuracy)
        axes.grid(axis="x", alpha=0.3)
    else:
        axes.set_xticks(place, [value.removeprefix("λ=") for value in values], rotation=30 if table == "cosine_epochs" else 0)
        axes.set(ylabel=accuracy, xlabel="tail-skew weight λ" if table == "tail_skew" else "head, epochs")
    axes.set_title(f"{title}: mean and range over the seeds", fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
