"""What `benchmarks.reproduce` trains: the cells of each table, under each budget, and the published numbers beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from benchmarks.reproduce import equal_cost, search
from benchmarks.reproduce.views import OTHER, PLAIN, STRONG, views
from pipelines.prepare.longtail import exp_counts

TABLES = (
    "cifar10_lt",
    "cifar100_lt",
    "tail_skew",
    "cosine_epochs",
    "readings",
    "recipe",
    "search",
    "equal_cost",
    "length",
    "imagenet_lt",
)
ON_VALIDATION = ("recipe", "search")  # whose runs are scored on a tenth of each class, set aside: they choose recipes
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
        "ProCo": {100: 85.9, 50: 88.2, 10: 91.9},
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
        "ProCo": {100: 54.2, 50: 57.1, 10: 65.5},
    },
    "imagenet": {"PaCo": {0: 57.0}, "ProCo": {0: 57.3}},
}
PUBLISHED_EPOCHS = {("imagenet", "PaCo"): 400}  # where they are not ours
# Their code keeps the best epoch on the test set, and that is what is published; ours is the last epoch's.
BEST_ON_TEST = ("LDAM-DRW", "BCL", "ProCo", "PaCo")
# The best with the same network as far as known, whose it is, and its epochs: what CIBL is to pass. DDC's are last epochs.
BEST_PUBLISHED: dict[str, dict[int, tuple[float, str, int]]] = {
    "cifar10": {100: (86.42, "DDC", 400), 50: (88.2, "ProCo", 200), 10: (91.9, "ProCo", 200)},
    "cifar100": {100: (54.2, "ProCo", 400), 50: (57.1, "ProCo", 200), 10: (65.59, "DDC", 400)},
    "imagenet": {0: (58.5, "GPaCo", 400)},
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
        for letter, word in (("λ", "lambda"), ("κ", "kappa"), ("τ", "tau"), ("ρ", "rho"), ("γ", "gamma")):
            value = value.replace(letter, word)
        return f"{self.dataset}-if{self.imbalance}-{re.sub('[^A-Za-z0-9.]+', '_', value)}-{self.seed}"


@dataclass(frozen=True)
class Budget:
    """How much is trained.

    Attributes:
        factors: Imbalance factors.
        epochs: Of a run; methods whose published number took longer are trained as much longer.
        jobs: Runs at a time; None: one a core.
        averaging: Momentum of an averaged network.
        full: Each method with its published recipe; else all on one short one, which compares methods and no published number.
        common: Options of every run.
        skews: More values of CIBL's λ to train, by data set.
    """

    factors: tuple[int, ...]
    epochs: int
    jobs: int | None
    averaging: float
    full: bool
    common: tuple[str, ...] = ()
    skews: dict[str, tuple[float, ...]] | None = None


_SHORT = ("--backbone", "resnet20", "--loader.kind", "resident")
BUDGETS = {
    # A checkpoint an epoch would cost as much as evaluation; ten epochs are some seconds.
    "gpu": Budget((100, 50, 10), 200, 3, 0.999, True, ("--checkpoint_every", "10", "--eval_batch_size", "2000")),
    # As `gpu`, one run after another on all cores; a stop loses five minutes at most.
    "laptop": Budget(
        (100, 50, 10),
        200,
        1,
        0.999,
        True,
        ("--checkpoint_every", "10", "--checkpoint_minutes", "5", "--loader.kind", "resident", "--eval_batch_size", "1000"),
        {"cifar10": (0.001, 0.02), "cifar100": (0.005, 0.1)},
    ),
    # An average over .999 would, in a run so short, be the initial network.
    "cpu": Budget((100,), 3, None, 0.99, False, (*_SHORT, "--schedule", "{kind: cosine, warmup_epochs: 1}")),
    # The recipes of the GPU budget, but for what few images and one epoch do not allow.
    "smoke": Budget((100,), 1, None, 0.99, True, (*_SHORT, "--batch_size", "64", "--warmup_epochs", "0")),
}
_SMOKE_PROFILE = "{kind: exp, imbalance: 100, largest: 100}"

_LINEAR, _COSINE = ("--head", "{kind: linear}"), ("--head", "{kind: cosine}")
_SCALE_30 = ("--head", "{kind: cosine, scale: {start: 30}}")


# Balanced softmax's code: 13,000 steps of 512 images, the rate rises for 800 of them and falls along a cosine.
_BALANCED_STEPS, _BALANCED_WARMUP, _BALANCED_BATCH = 13_000, 800, 512


def _balanced_epochs(dataset: str, factor: int, steps: int) -> int:
    """Epochs of so many of balanced softmax's steps, rounded up."""
    classes, largest = {"cifar10": (10, 5000), "cifar100": (100, 500)}[dataset]
    return -(-steps // (int(exp_counts(classes, largest, factor).sum()) // _BALANCED_BATCH))


def _epochs(method: str, dataset: str, budget: Budget, factor: int) -> int:
    """The budget's, longer where a method's published number took more than 200 epochs."""
    if not budget.full:
        return budget.epochs
    of_200 = {
        "PaCo": 400,
        "ProCo": 400 if (dataset, factor) == ("cifar100", 100) else 200,
        "balanced softmax": _balanced_epochs(dataset, factor, _BALANCED_STEPS),
    }.get(method, 200)
    return of_200 * budget.epochs // 200 or 1


def _tail_skew(dataset: str, budget: Budget) -> float:
    """CIBL's λ. Of the recipes: what short runs at a batch of 128 leave open on validation data (.01 with ten classes, where
    .05 overshoots; .05 with a hundred), halved for a batch of 256, in which |P| is twice as large."""
    return {"cifar10": 0.005, "cifar100": 0.025}[dataset] if budget.full else 0.05


# The rows whose recipe is a file, recipes/NAME_cifar100_lt and recipes/NAME_cifar10_lt.
RECIPES = {
    "CE": "ce",
    "LDAM-DRW": "ldam",
    "VS": "vs",
    "balanced softmax": "balanced_softmax",
    "Hybrid-SC": "hybrid",
    "Hybrid-PSC": "hybrid",
    "BCL": "bcl",
    "PaCo": "paco",
    "ProCo": "proco",
}


def methods(dataset: str, budget: Budget, factor: int) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each method's configuration and options: the recipe in its authors' name where the budget is full, else one for all."""
    cibl = f"{{kind: cibl, tail_skew: {_tail_skew(dataset, budget)}, kappa: 1}}"
    ours = {
        "CIBL, linear head": (*_LINEAR, "--loss", cibl),
        "CIBL, cosine head": (*_COSINE, "--loss", cibl),
    }
    base = f"{dataset}_lt"
    if not budget.full:
        short = {
            "CE": (*_LINEAR, "--loss", "{kind: cross_entropy}"),
            # Re-weighting begins in the last fifth of the epochs; three have no last fifth, so it is the last one.
            "LDAM-DRW": (*_SCALE_30, "--loss", "{kind: ldam, reweight_from: 0.6}"),
            "balanced softmax": ("--loss", "{kind: balanced_softmax}"),
            "Hybrid-SC": (*_LINEAR, "--loss", "{kind: hybrid_sc, temperature: 0.1}"),
            "Hybrid-PSC": (*_LINEAR, "--loss", f"{{kind: hybrid_psc, temperature: {_psc(dataset)}}}"),
            "BCL": ("--loss", "{kind: bcl}"),
            "PaCo": ("--loss", f"{{kind: paco, momentum: {budget.averaging}}}"),
            **ours,
        }
        return {method: (base, options) for method, options in short.items()}
    more: dict[str, tuple[str, ...]] = {
        "VS": ("--loss.kappa", "0.5") if factor == 10 else (),
        "balanced softmax": ("--warmup_epochs", str(_balanced_epochs(dataset, factor, _BALANCED_WARMUP))),
        "Hybrid-PSC": ("--loss", f"{{kind: hybrid_psc, temperature: {_psc(dataset)}}}"),
        "LDAM-DRW": () if budget.epochs >= 5 else ("--loss.reweight_from", "0"),
    }
    found = {}
    for method, name in RECIPES.items():
        longer = "_400" if _epochs(method, dataset, BUDGETS["gpu"], factor) == 400 and method == "ProCo" else ""
        found[method] = (f"recipes/{name}_{base}{longer}", more.get(method, ()))
    strong = f"recipes/{base}_if{factor}_200"
    if budget.skews:
        for skew in budget.skews[dataset]:
            loss = f"{{kind: cibl, tail_skew: {skew}, kappa: 1}}"
            ours[f"CIBL, cosine head, λ = {skew}"] = (*_COSINE, "--loss", loss)
    return found | {method: (strong, options) for method, options in ours.items()}


def _psc(dataset: str) -> float:
    """Hybrid-PSC's temperature."""
    return 1.0 if dataset == "cifar10" else 0.1


def variants(dataset: str, budget: Budget) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Rows of the table `recipe`: CIBL's base recipe, and it with one thing changed. Epochs, as multiples, and options."""

    def row(*options: str, head: str = "{kind: cosine}", times: int = 1, **loss: object) -> tuple[int, tuple[str, ...]]:
        fields = {"kind": "cibl", "tail_skew": _tail_skew(dataset, budget), "kappa": 1, **loss}
        return times, ("--head", head, "--loss", yaml.safe_dump(fields, default_flow_style=True).strip(), *options)

    other = {"plain views": row(*views(PLAIN, PLAIN))} if budget.full else {"strong views": row(*views(STRONG, OTHER))}
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
        "three views": row(*views(*(STRONG, OTHER, OTHER) if budget.full else 3 * (PLAIN,))),
        **other,
        "half the batch": row("--batch_size", "128" if budget.full else "64"),
        "twice the learning rate": row("--lr", "0.3" if budget.full else "0.2"),
        "weight decay 2e-4": row("--weight_decay", "2e-4"),
        "twice the epochs": row(times=2),
    }


def cells(table: str, name: str, seeds: int, val: float) -> list[Cell]:
    """Every run of a table, first seeds first, so that a stopped measurement has something to say of each row.

    imagenet_lt, search, equal_cost and length have no budget cpu.
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
                    for method, (config, options) in methods(dataset, budget, factor).items():
                        epochs = _epochs(method, dataset, budget, factor)
                        found.append(_cell(dataset, factor, method, seed, name, config, options, epochs, common))
            case "tail_skew":
                for dataset in ("cifar10", "cifar100"):
                    for skew in LAMBDAS:
                        options = (*_LINEAR, "--loss", f"{{kind: cibl, tail_skew: {skew}}}")
                        found.append(
                            _cell(dataset, 100, f"λ={skew}", seed, name, f"{dataset}_lt", options, budget.epochs, common)
                        )
            case "readings":
                for reading, option in READINGS.items():
                    for skew in READ_AT:
                        options = (*_LINEAR, "--loss", f"{{kind: cibl, tail_skew: {skew}{option}}}")
                        value = f"{reading}, λ={skew}"
                        found.append(_cell("cifar100", 100, value, seed, name, "cifar100_lt", options, budget.epochs, common))
            case "recipe":
                for dataset in ("cifar100", "cifar10"):
                    for value, (times, options) in variants(dataset, budget).items():
                        epochs = times * budget.epochs
                        config = f"recipes/{dataset}_lt_if100_200" if budget.full else f"{dataset}_lt"
                        found.append(_cell(dataset, 100, value, seed, name, config, options, epochs, common))
            case "search":
                for value, (epochs, options) in search.rows(budget.epochs).items():
                    found.append(_cell("cifar100", 100, value, seed, name, search.CONFIG, options, epochs, common))
            case "equal_cost":
                for dataset in ("cifar100", "cifar10"):
                    for value, (epochs, options) in equal_cost.rows(dataset, 100, budget.epochs).items():
                        found.append(_cell(dataset, 100, value, seed, name, f"{dataset}_lt", options, epochs, common))
            case "length":
                for value, (epochs, options) in equal_cost.lengths(100, budget.epochs).items():
                    found.append(_cell("cifar100", 100, value, seed, name, "cifar100_lt", options, epochs, common))
            case "cosine_epochs":
                for dataset in ("cifar10", "cifar100"):
                    for head, options in (("linear", _LINEAR), ("cosine", _COSINE)):
                        for share in (0.25, 0.5, 0.75, 1.0) if head == "cosine" else (1.0,):
                            epochs = max(1, round(budget.epochs * share))
                            value, loss = f"{head}, {epochs}", ("--loss", "{kind: cibl, tail_skew: 0.05}")
                            every = (*options, *loss)
                            found.append(_cell(dataset, 100, value, seed, name, f"{dataset}_lt", every, epochs, common))
    return list({cell.name: cell for cell in found}.values())  # lengths of a short budget may fall together


def _cell(
    dataset: str, factor: int, value: str, seed: int, budget: str, config: str, options: tuple[str, ...], epochs: int,
    common: tuple[str, ...],
) -> Cell:  # fmt: skip
    # The recipes' subset is the field's, as far as no validation split is carved out before.
    subset = ", subset: field" if config.startswith("recipes/") else ""
    profile = _SMOKE_PROFILE if budget == "smoke" else f"{{kind: exp, imbalance: {factor}{subset}}}"
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
    ninety = "recipes/imagenet_lt_90"
    chosen: dict[str, tuple[str, tuple[str, ...]]] = {
        "balanced softmax": (ninety, ("--loss", "{kind: balanced_softmax}")),
        "BCL": ("recipes/bcl_imagenet_lt", ()),
        "ProCo": ("recipes/proco_imagenet_lt", ()),
        "PaCo": ("recipes/paco_imagenet_lt", ()),
        "CIBL, linear head": (ninety, _LINEAR),
        "CIBL, cosine head": (ninety, ()),
    }
    return [
        Cell("imagenet", 0, method, seed, config, (*options, *length, "--seed", str(seed)))
        for method, (config, options) in chosen.items()
    ]
