"""Lines of JSON, and the tables and pictures drawn from them."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock

import numpy as np
from matplotlib.figure import Figure

from benchmarks.reproduce import claims
from benchmarks.reproduce.cells import BEST_ON_TEST, BEST_PUBLISHED, BUDGETS, ON_VALIDATION, PUBLISHED, PUBLISHED_EPOCHS, Cell
from benchmarks.reproduce.lines import Line, source_of

TITLES = {"cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT", "imagenet": "ImageNet-LT"}
COLUMNS = ("overall", "many", "medium", "few", "head", "middle", "tail")
COLORS = {"overall": "black", "head": "#2a6f97", "middle": "#8a8a8a", "tail": "#c8553d"}
_CHOICE = {
    **dict.fromkeys(ON_VALIDATION, "No score here is of the test set: recipes are chosen by these."),
    "tail_skew": "No epoch is chosen on the test set. CIBL without the log-prior (κ = 0).",
    "equal_cost": "No epoch is chosen on the test set. One recipe for all; a million passes a run, forward and backward.",
    "length": "No epoch is chosen on the test set. The recipe of equal_cost, with fewer or more passes.",
    "imagenet_lt": "No epoch is chosen on the test set. CIBL: λ = .05, κ = 1, chosen on no data of this set.",
    "readings": "No epoch is chosen on the test set. CIBL, linear head.",
    "cosine_epochs": "No epoch is chosen on the test set. CIBL: λ = .05, κ = 0.",
}
_OF_METHODS = {
    True: "No epoch is chosen on the test set. CIBL's λ and κ = 1 come from short runs scored on validation data (recipe).",
    False: "No epoch is chosen on the test set. "
    "CIBL's λ = .05 and κ = 1 looked best on it in docs/lab-notes/short-runs/claims, after five epochs.",
}
_SCORED = dict.fromkeys(
    ON_VALIDATION, "a balanced validation split, a tenth of each class's images before the long tail is cut"
)
_LISTED = 10  # rows that are named one by one, where they are not run yet
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


def means(lines: list[Line]) -> dict[str, dict[str, float | int | None]]:
    """Of each row: mean and deviation of the overall accuracy, %, and of how many seeds."""
    found: dict[str, dict[str, float | int | None]] = {}
    for (dataset, factor), rows in groups(lines).items():
        for value, of in rows.items():
            scores = 100 * np.array([line["last"]["overall"] for line in of])
            spread = round(float(scores.std(ddof=1)), 2) if len(of) > 1 else None
            found[f"{dataset} IF {factor} {value}"] = {
                "mean": round(float(scores.mean()), 2),
                "spread": spread,
                "seeds": len(of),
            }
    return found


def write(path: Path, known: list[Line], every: list[Cell]) -> None:
    """`path` with the suffix .md, and a picture for each data set and factor.

    Args:
        path: The file of the lines.
        known: The lines of runs that ended or failed.
        every: All cells of the table.
    """
    lines, failed = [line for line in known if "failed" not in line], [line for line in known if "failed" in line]
    first = lines[0]
    table, full = first["table"], first["budget"] != "smoke" and BUDGETS[first["budget"]].full
    text = [
        f"# {table}, budget `{first['budget']}`",
        "",
        f"{len(lines)} of {len(every)} runs{_absent(known, every)}. Accuracy on "
        f"{_SCORED.get(table, 'the balanced test set')}, %, last epoch: mean ± deviation over seeds (how many). "
        "many, medium, few: classes with more than 100, 20 to 100, fewer than 20 training images; head, middle, tail: thirds "
        "of the classes. minutes: of the epochs, evaluation apart. " + _CHOICE.get(table, _OF_METHODS[full]),
    ]
    if not full:
        text += ["", "**Short runs of a small network: they compare methods, and no published number.**"]
    for (dataset, factor), rows in groups(lines).items():
        if "base" in rows:  # the others change one thing of it
            rows = dict(sorted(rows.items(), key=lambda item: -_overall(item[1])))
        compared = full and table in ("cifar10_lt", "cifar100_lt", "imagenet_lt")
        published = {name: by_factor.get(factor) for name, by_factor in PUBLISHED[dataset].items()} if compared else {}
        title = TITLES[dataset] + (f", imbalance factor {factor}" if factor else "")
        text += ["", f"## {title}", "", *_table(dataset, rows, published)]
        for line in failed:
            if (line["dataset"], line["imbalance"]) == (dataset, factor):
                text += ["", f"**Failed: {line['value']}, seed {line['seed']}: {line['failed']}**"]
        picture = path.with_name(f"{path.stem}-{dataset}{f'-if{factor}' if factor else ''}.png")
        _picture(picture, title, rows, published, table)
        if compared and factor in BEST_PUBLISHED[dataset]:
            if any(published.get(name) is not None for name in BEST_ON_TEST):
                text += ["", "Published †: the best epoch on the test set, as their code keeps it. Ours is the last epoch's."]
            number, method, epochs = BEST_PUBLISHED[dataset][factor]
            text += ["", f"The best published number with this network is {method}'s: {number:.1f}, in {epochs} epochs."]
        subsets = sorted({_subset(line) for of_row in rows.values() for line in of_row})
        kept = {"field": "those of the published tables", "seeded": "this project's draw"}
        if table != "imagenet_lt":
            text += ["", f"Images of each class: {', '.join(kept[subset] for subset in subsets)} (`data.profile.subset`)."]
        text += [*_unlike(rows), "", f"![{title}]({picture.name})"]
        by_skew = claims.by_skew(rows)
        if table == "equal_cost" and len(by_skew) > 2:
            picture = picture.with_name(f"{picture.stem}-skew.png")
            _picture(picture, title, by_skew, {}, "tail_skew")
            text += ["", f"![{title}, accuracy over λ]({picture.name})"]
    text += claims.sentences(claims.figures(table, lines))
    again = f"{table} --budget {first['budget']} --seeds {1 + max(line['seed'] for line in lines)}"
    again += (" --val SHARE" if "-val" in path.stem else "") + (" --compile" if path.stem.endswith("-compiled") else "")
    text += [
        "",
        f"Machine: {'; '.join(sorted({_machine(line) for line in lines}))}. Code: {_code(lines)}.",
        "",
        f"Every run's command, configuration, scores and machine: [{path.name}]({path.name}). All of it again: "
        f"`python -m benchmarks.reproduce {again} --docs FOLDER --runs FOLDER`, with image folders "
        f"`{' '.join(f'--{dataset} FOLDER' for dataset in sorted({line['dataset'] for line in lines}))}`.",
    ]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def _absent(known: list[Line], every: list[Cell]) -> str:
    """Which rows no seed was run of: '' or ' (not run yet: ...)'."""
    there, absent = {key(line)[:3] for line in known}, dict[tuple[str, int], dict[str, None]]()
    for cell in every:
        if row(cell) not in there:
            absent.setdefault((cell.dataset, cell.imbalance), {})[cell.value] = None
    begun = {of_row[:2] for of_row in there}
    named = []
    for (dataset, factor), values in absent.items():
        listed = ", ".join(f"`{value}`" for value in values) if len(values) <= _LISTED else f"{len(values)} rows"
        which = f": {listed}" if (dataset, factor) in begun else ""
        named.append(TITLES[dataset] + (f" at {factor}" if factor else "") + which)
    return f" (not run yet: {'; '.join(named)})" if named else ""


def _table(dataset: str, rows: dict[str, list[Line]], published: dict[str, float | None]) -> list[str]:
    """Markdown: a row's scores, beside what its authors published, or where the table has a row `base`, beside that."""
    base = rows.get("base")
    with_best = any("best" in line for of_row in rows.values() for line in of_row)
    head = ["", *COLUMNS, *(["best on validation"] if with_best else [])]
    head += [*(["published", "difference"] if published else []), *(["against base", "M passes"] if base else []), "minutes"]
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for value, of_row in rows.items():
        cells = [value, *(_cell([line["last"][name] for line in of_row]) for name in COLUMNS)]
        if with_best:
            cells.append(_cell([line["best"]["overall"] for line in of_row if "best" in line]))
        if published:
            number, epochs = published.get(value), PUBLISHED_EPOCHS.get((dataset, value))
            ours = _overall(of_row)
            mark = " †" if value in BEST_ON_TEST else ""
            cells.append("–" if number is None else f"{number:.1f}{mark}" + (f" ({epochs} epochs)" if epochs else ""))
            cells.append("–" if number is None else f"{ours - number:+z.1f}")
        if base is not None:
            cells.append(f"{_overall(of_row) - _overall(base):+z.1f}")
            passes = [line["passes"] + line["forward_passes"] / 3 for line in of_row if "passes" in line]
            cells.append(f"{np.mean(passes) / 1e6:.2f}" if passes else "–")  # lines of earlier versions do not say
        cells.append(f"{np.mean([line['seconds'] for line in of_row]) / 60:.1f}")
        text.append("| " + " | ".join(cells) + " |")
    return text


def _overall(lines: list[Line]) -> float:
    """The mean overall accuracy, %."""
    return 100 * float(np.mean([line["last"]["overall"] for line in lines]))


def _unlike(rows: dict[str, list[Line]]) -> list[str]:
    """Which rows had other images, precision or machine than others: a part of their difference may be due to that."""
    made = {(value, line["seed"]): _conditions(line) for value, of_row in rows.items() for line in of_row}
    differing = [name for name in next(iter(made.values())) if len({conditions[name] for conditions in made.values()}) > 1]
    if not differing:
        return []
    alike: dict[str, dict[str, list[int]]] = {}
    for (value, seed), conditions in made.items():
        named = ", ".join(f"{name} {conditions[name]}" for name in differing)
        alike.setdefault(named, {}).setdefault(value, []).append(seed)
    text = ["", "**Not all runs were made alike; a part of their difference may be due to that:**", ""]
    for named, values in alike.items():
        parts = [
            value + ("" if len(seeds) == len(rows[value]) else f" (seed {', '.join(map(str, seeds))})")
            for value, seeds in values.items()
        ]
        text.append(f"- {named}: {', '.join(parts)}")
    return text


def _conditions(line: Line) -> dict[str, str]:
    """What runs that are compared should share."""
    return {
        "images from": source_of(line),
        "subset": _subset(line),
        "test images": str((line.get("data") or {}).get("test", "not recorded"))[:12],
        "precision": line.get("precision", "not recorded"),
        "machine": _machine(line),
    }


def _subset(line: Line) -> str:
    """Which images of each class were kept: drawn by this project's seed, or those of the published tables."""
    return str(line.get("config", {}).get("data", {}).get("profile", {}).get("subset", "seeded"))


def _machine(line: Line) -> str:
    return f"{line['hardware']}, torch {line['machine']['torch']}"


def _code(lines: list[Line]) -> str:
    """The commits of the code that trained, or, where none is known to have it, its digests."""
    commits = sorted({f"commit {line['commit']}" for line in lines if line["commit"]})
    digests = sorted({f"digest {digest}" for line in lines if not line["commit"] for digest in line["code"]})
    return ", ".join(commits + digests)


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
    one = max(map(len, rows.values())) == 1
    axes.set_title(f"{title}: {'one seed' if one else 'mean and range over the seeds'}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
