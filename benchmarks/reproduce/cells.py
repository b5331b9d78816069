"""What `benchmarks.reproduce` trains: the cells of each table, under each budget, and the published numbers beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from pipelines.prepare.longtail import exp_counts

TABLES = ("cifar10_lt", "cifar100_lt", "tail_skew", "cosine_epochs", "readings", "recipe", "imagenet_lt")
LAMBDAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
# What the paper's text leaves open, at the λ where it matters.
READINGS = {
    "plain": "",
    "log-prior": ", kappa: 1",
    "queue": ", queue: 1024",
    "normalised over the batch": ", normalize: batch",
    "normalised by class": ", normalize: class",
}
READ_AT = (0.05, 0.5, 5.0)

# Top-1 on the balanced test set, %, by imbalance factor; ResNet-32. Leaderboards and READMEs of Bag of Tricks LT, MiSLAS, PaCo,
# BCL and ProCo; Hybrid's from a table of its paper as others quote it. CIBL's own tables were not at hand.
PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "cifar10": {
        "CE": {100: 70.4, 50: 74.8, 10: 86.4},
        "LDAM-DRW": {100: 77.0, 10: 88.2},
        "balanced softmax": {100: 83.1, 10: 90.9},
        "Hybrid-SC": {100: 81.40, 50: 85.36, 10: 91.12},
        "Hybrid-PSC": {100: 78.82, 50: 83.86, 10: 90.06},
    },
    "cifar100": {
        "CE": {100: 38.3, 50: 43.9, 10: 55.7},
        "LDAM-DRW": {100: 42.0, 10: 58.7},
        "balanced softmax": {100: 50.3, 10: 63.1},
        "Hybrid-SC": {100: 46.72, 50: 51.87, 10: 63.05},
        "Hybrid-PSC": {100: 44.97, 50: 48.93, 10: 62.37},
        "PaCo": {100: 52.0, 50: 56.0, 10: 64.2},
        "BCL": {100: 53.9, 50: 56.6, 10: 64.9},
    },
    "imagenet": {"PaCo": {0: 57.0}},
}
PUBLISHED_EPOCHS = {("imagenet", "PaCo"): 400}  # where they are not ours
# ProCo's, the best with the same network as far as known, and its epochs: what CIBL is to pass.
BEST_PUBLISHED: dict[str, dict[int, tuple[float, int]]] = {
    "cifar10": {100: (85.9, 200), 50: (88.2, 200), 10: (91.9, 200)},
    "cifar100": {100: (54.2, 400), 50: (57.1, 200), 10: (65.5, 200)},
    "imagenet": {0: (57.3, 90)},
}


@dataclass(frozen=True)
class Cell:
    """One run. imbalance: 0 where the lists decide it. value: what the table's rows are: a method, a λ, epochs, or what is
    changed of a recipe."""

    dataset: str
    imbalance: int
    value: str
    seed: int
    config: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        value = self.value
        for letter, word in (("λ", "lambda"), ("κ", "kappa"), ("τ", "tau")):
            value = value.replace(letter, word)
        return f"{self.dataset}-if{self.imbalance}-{re.sub('[^A-Za-z0-9.]+', '_', value)}-{self.seed}"


@dataclass(frozen=True)
class Budget:
    """factors: imbalance factors. common: options of every run. averaging: momentum of an averaged network.

    full: each method with the published recipe; else all on one short one, which compares methods and no published number.
    """

    factors: tuple[int, ...]
    epochs: int
    jobs: int | None
    averaging: float
    full: bool
    common: tuple[str, ...] = ()


_SHORT = ("--backbone", "resnet20", "--loader.kind", "resident")
BUDGETS = {
    # A checkpoint an epoch would cost as much as evaluation; ten epochs are some seconds.
    "gpu": Budget((100, 50, 10), 200, 3, 0.999, True, ("--checkpoint_every", "10", "--eval_batch_size", "2000")),
    # An average over .999 would, in a run so short, be the initial network.
    "cpu": Budget((100,), 3, None, 0.99, False, (*_SHORT, "--schedule", "{kind: cosine, warmup_epochs: 1}")),
    # The recipes of the GPU budget, but for what few images and one epoch do not allow.
    "smoke": Budget((100,), 1, None, 0.99, True, (*_SHORT, "--batch_size", "64", "--warmup_epochs", "0")),
}
_SMOKE_PROFILE = "{kind: exp, imbalance: 100, largest: 100}"

_LINEAR, _COSINE = ("--head", "{kind: linear}"), ("--head", "{kind: cosine}")
_CROP, _RESIZED = "cut: {kind: crop, padding: 4}", "cut: {kind: resized, scale: [0.2, 1.0]}"
_PLAIN = f"{{{_CROP}}}"
_STRONG = f"{{{_CROP}, augment: [{{kind: auto_augment}}, {{kind: cutout, size: 16}}]}}"
_OTHER = f"{{{_RESIZED}, augment: [{{kind: color_jitter}}, {{kind: grayscale}}]}}"
_BLURRED = f"{{{_RESIZED}, augment: [{{kind: color_jitter}}, {{kind: grayscale}}, {{kind: blur}}]}}"
_HYBRID_VIEW = f"{{{_CROP}, augment: [{{kind: grayscale, probability: 0.2}}]}}"


def _views(*each: str) -> tuple[str, str]:
    return "--data.views", f"[{', '.join(each)}]"


HYBRID = (
    *("--batch_size", "512", "--lr", "0.5", "--weight_decay", "1e-4", *_views(_HYBRID_VIEW, _HYBRID_VIEW)),
    *("--schedule", "{kind: steps, warmup_epochs: 5, milestones: [0.6, 0.8]}"),
)


# LDAM's code, for cross-entropy too: one view, plain momentum, ×.01 at 160 and 180 of 200 epochs.
_LDAM = (
    *_views(_PLAIN), "--weight_decay", "2e-4", "--optimizer.nesterov", "false",
    "--schedule", "{kind: steps, warmup_epochs: 5, gamma: 0.01}",
)  # fmt: skip
_SCALE_30 = ("--head", "{kind: cosine, scale: {start: 30}}")


def _paco(factor: int) -> tuple[str, ...]:
    """PaCo's code for CIFAR-LT, but for its projection: there of width 64, with batch normalisation. 400 epochs, as there."""
    rate, alpha = ("0.05", 0.01) if factor == 10 else ("0.02", 0.02)
    return (
        *_LINEAR, *_views(_STRONG, _BLURRED), "--batch_size", "128", "--lr", rate, "--optimizer.nesterov", "false",
        "--schedule", "{kind: steps, warmup_epochs: 10}", "--loss", f"{{kind: paco, temperature: 0.05, alpha: {alpha}}}",
    )  # fmt: skip


# Balanced softmax's code: 13,000 steps of 512 images, the rate rises for 800 of them and falls along a cosine.
_BALANCED_STEPS, _BALANCED_WARMUP, _BALANCED_BATCH = 13_000, 800, 512


def _balanced_epochs(dataset: str, factor: int, steps: int) -> int:
    """Epochs of so many of balanced softmax's steps, rounded up."""
    classes, largest = {"cifar10": (10, 5000), "cifar100": (100, 500)}[dataset]
    return -(-steps // (int(exp_counts(classes, largest, factor).sum()) // _BALANCED_BATCH))


def _balanced(dataset: str, factor: int) -> tuple[str, ...]:
    """Balanced softmax's code for CIFAR-LT: one strong view; there the warm-up begins at half the rate, here at none."""
    warmup = _balanced_epochs(dataset, factor, _BALANCED_WARMUP)
    return (
        *_LINEAR, *_views(_STRONG), "--batch_size", str(_BALANCED_BATCH), "--lr", "0.1", "--optimizer.nesterov", "false",
        "--schedule", f"{{kind: cosine, warmup_epochs: {warmup}}}",
    )  # fmt: skip


def _epochs(method: str, dataset: str, budget: Budget, factor: int) -> int:
    """The budget's, longer where a method's published number took more than 200 epochs."""
    if not budget.full:
        return budget.epochs
    of_200 = {"PaCo": 400, "balanced softmax": _balanced_epochs(dataset, factor, _BALANCED_STEPS)}.get(method, 200)
    return of_200 * budget.epochs // 200 or 1


def _tail_skew(dataset: str, budget: Budget) -> float:
    """CIBL's λ. Of the recipes: what short runs at a batch of 128 leave open on validation data (.01 with ten classes, where
    .05 overshoots; .05 with a hundred), halved for a batch of 256, in which |P| is twice as large."""
    return {"cifar10": 0.005, "cifar100": 0.025}[dataset] if budget.full else 0.05


def methods(dataset: str, budget: Budget, factor: int) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each method's recipe ('plain', 'strong' or 'hybrid'), and its options: its authors' where the budget is full."""
    psc, full = 1.0 if dataset == "cifar10" else 0.1, budget.full
    paco = _paco(factor) if full else ("--loss", f"{{kind: paco, momentum: {budget.averaging}}}")
    # CE on the first view alone; BCL's own code contrasts the other two, ours all three.
    three = (*_SCALE_30, *_views(_STRONG, _OTHER, _OTHER), "--loss", "{kind: bcl, classify: first}")
    bcl = three if full else ("--loss", "{kind: bcl}")
    # Re-weighting begins in the last fifth of the epochs; fewer than five have no last fifth, so there it is the last one.
    cibl = f"{{kind: cibl, tail_skew: {_tail_skew(dataset, budget)}, kappa: 1}}"
    ldam = "{kind: ldam}" if budget.epochs >= 5 else f"{{kind: ldam, reweight_from: {0.6 if budget.epochs > 1 else 0}}}"
    return {
        "CE": ("plain", (*_LINEAR, *(_LDAM if full else ()), "--loss", "{kind: cross_entropy}")),
        "LDAM-DRW": (
            "plain", (*_SCALE_30, *(_LDAM if full else ()), "--loss", ldam),
        ),
        "balanced softmax": (
            "strong", (*(_balanced(dataset, factor) if full else ()), "--loss", "{kind: balanced_softmax}"),
        ),
        "Hybrid-SC": ("hybrid", (*_LINEAR, "--loss", "{kind: hybrid_sc, temperature: 0.1}")),
        "Hybrid-PSC": ("hybrid", (*_LINEAR, "--loss", f"{{kind: hybrid_psc, temperature: {psc}}}")),
        "BCL": ("strong", bcl),
        "PaCo": ("strong", paco),
        "CIBL, linear head": ("strong", (*_LINEAR, "--loss", cibl)),
        "CIBL, cosine head": ("strong", (*_COSINE, "--loss", cibl)),
    }  # fmt: skip


def variants(dataset: str, budget: Budget) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Rows of the table `recipe`: CIBL's base recipe, and it with one thing changed. Epochs, as multiples, and options."""

    def row(*options: str, head: str = "{kind: cosine}", times: int = 1, **loss: object) -> tuple[int, tuple[str, ...]]:
        fields = {"kind": "cibl", "tail_skew": _tail_skew(dataset, budget), "kappa": 1, **loss}
        return times, ("--head", head, "--loss", yaml.safe_dump(fields, default_flow_style=True).strip(), *options)

    other = {"plain views": row(*_views(_PLAIN, _PLAIN))} if budget.full else {"strong views": row(*_views(_STRONG, _OTHER))}
    return {
        "base": row(),
        "λ = 0": row(tail_skew=0),
        "λ = 0.01": row(tail_skew=0.01),
        "λ = 0.2": row(tail_skew=0.2),
        "κ = 0": row(kappa=0),
        "κ = 0.5": row(kappa=0.5),
        "normalised over the batch": row(normalize="batch"),
        "normalised by class": row(normalize="class"),
        "CE on the first view": row(classify="first"),
        "τ = 0.07": row(temperature=0.07),
        "τ = 0.2": row(temperature=0.2),
        "queue of 1024": row(queue=1024),
        "queue of 1024, averaged keys": row(queue=1024, momentum=budget.averaging),
        "linear head": row(head="{kind: linear}"),
        "scale 30": row(head="{kind: cosine, scale: {start: 30}}"),
        "scale 8 to 24": row(head="{kind: cosine, scale: {start: 8, end: 24, shape: cosine}}"),
        "learned scale": row(head="{kind: cosine, scale: {start: 16, learnable: true}}"),
        "averaged weights": row("--train.average", str(budget.averaging)),
        "square-root sampling": row("--data.sampling", "square_root"),
        "three views": row(*_views(*(_STRONG, _OTHER, _OTHER) if budget.full else 3 * (_PLAIN,))),
        **other,
        "half the batch": row("--batch_size", "128" if budget.full else "64"),
        "twice the learning rate": row("--lr", "0.3" if budget.full else "0.2"),
        "weight decay 2e-4": row("--weight_decay", "2e-4"),
        "twice the epochs": row(times=2),
    }


def cells(table: str, name: str, seeds: int, val: float) -> list[Cell]:
    """Every run of a table, first seeds first, so that a stopped measurement has something to say of each row.

    imagenet_lt has no budget cpu.
    """
    budget = BUDGETS[name]
    common = budget.common + (("--val_fraction", str(val)) if val else ())
    found = []
    for seed in range(seeds):
        match table:
            case "imagenet_lt":
                found += _imagenet(seed, name == "smoke")
            case "cifar10_lt" | "cifar100_lt":
                dataset = table.removesuffix("_lt")
                for factor in budget.factors:
                    for method, (recipe, options) in methods(dataset, budget, factor).items():
                        epochs = _epochs(method, dataset, budget, factor)
                        found.append(_cell(dataset, factor, method, seed, name, recipe, options, epochs, common))
            case "tail_skew":
                for dataset in ("cifar10", "cifar100"):
                    for skew in LAMBDAS:
                        options = (*_LINEAR, "--loss", f"{{kind: cibl, tail_skew: {skew}}}")
                        found.append(_cell(dataset, 100, f"λ={skew}", seed, name, "plain", options, budget.epochs, common))
            case "readings":
                for reading, option in READINGS.items():
                    for skew in READ_AT:
                        options = (*_LINEAR, "--loss", f"{{kind: cibl, tail_skew: {skew}{option}}}")
                        value = f"{reading}, λ={skew}"
                        found.append(_cell("cifar100", 100, value, seed, name, "plain", options, budget.epochs, common))
            case "recipe":
                for dataset in ("cifar100", "cifar10"):
                    for value, (times, options) in variants(dataset, budget).items():
                        epochs = times * budget.epochs
                        found.append(_cell(dataset, 100, value, seed, name, "strong", options, epochs, common))
            case "cosine_epochs":
                for dataset in ("cifar10", "cifar100"):
                    for head, options in (("linear", _LINEAR), ("cosine", _COSINE)):
                        for share in (0.25, 0.5, 0.75, 1.0) if head == "cosine" else (1.0,):
                            epochs = max(1, round(budget.epochs * share))
                            value, loss = f"{head}, {epochs}", ("--loss", "{kind: cibl, tail_skew: 0.05}")
                            found.append(_cell(dataset, 100, value, seed, name, "plain", (*options, *loss), epochs, common))
    return list({cell.name: cell for cell in found}.values())  # lengths of a short budget may fall together


def _cell(
    dataset: str, factor: int, value: str, seed: int, budget: str, recipe: str, options: tuple[str, ...], epochs: int,
    common: tuple[str, ...],
) -> Cell:  # fmt: skip
    config, profile = f"{dataset}_lt", f"{{kind: exp, imbalance: {factor}}}"
    if BUDGETS[budget].full and recipe == "strong":
        config = f"recipes/{dataset}_lt_if{factor}_200"
    elif BUDGETS[budget].full and recipe == "hybrid":
        options = (*HYBRID, *options)
    if budget == "smoke":
        profile = _SMOKE_PROFILE
    every = ("--data.profile", profile, *options, *common, "--epochs", str(epochs), "--seed", str(seed))
    return Cell(dataset, factor, value, seed, config, every)


# Small images, so that ResNet-50 takes seconds on a CPU; every class of the lists has the five images of the largest.
_IMAGENET_SMOKE = (
    *("--data.size", "64", "--data.profile", "{kind: exp, imbalance: 5, largest: 5}", "--batch_size", "16"),
    *("--warmup_epochs", "0", "--epochs", "1"),
)


def _imagenet(seed: int, smoke: bool) -> list[Cell]:
    """ResNet-50, 90 epochs, one run at a time: for those who have the images, and a GPU. The lists bring their validation."""
    length = _IMAGENET_SMOKE if smoke else ("--epochs", "90")
    chosen: dict[str, tuple[str, ...]] = {
        "balanced softmax": ("--loss", "{kind: balanced_softmax}"),
        "BCL": ("--loss", "{kind: bcl, temperature: 0.07, cross_entropy_weight: 1, contrastive_weight: 0.35, classify: first}"),
        "PaCo": ("--lr", "0.02", *_LINEAR, "--loss", "{kind: paco, temperature: 0.2, queue: 8192}"),
        "CIBL, linear head": _LINEAR,
        "CIBL, cosine head": (),
    }
    return [
        Cell("imagenet", 0, method, seed, "recipes/imagenet_lt_90", (*options, *length, "--seed", str(seed)))
        for method, options in chosen.items()
    ]
