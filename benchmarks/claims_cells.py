"""The runs that `benchmarks.claims` compares."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.reproduce_cells import HYBRID

TITLES = {"cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT"}
LAMBDAS = (0.0, 0.01, 0.05, 0.5, 5.0)
READINGS = {
    "log-prior": "kappa: 1",
    "queue": "queue: 1024",
    "normalised": "normalize: batch",
    "normalised by class": "normalize: class",
}
READ_AT = (0.05, 0.5, 5.0)  # λ of the readings: CIFAR-100-LT, where λ moves least to the tail, and the first seed only


@dataclass(frozen=True)
class Budget:
    """epochs: of a full run. cosine: epochs of each of the cosine head's runs. averaging: momentum of PaCo's network. full: by
    the field's recipe and length. hours: after which no run begins that would end later; None: all of them."""

    epochs: int
    cosine: tuple[int, ...]
    averaging: float
    seeds: int
    options: tuple[str, ...]
    full: bool = False
    hours: float | None = None


CPU = ("--backbone", "resnet20", "--schedule", "{kind: cosine, warmup_epochs: 1}", "--loader.kind", "torch")
BUDGETS = {
    # PaCo's average over .999 would, in a run so short, be the initial network.
    "cpu": Budget(5, (2, 3, 5), 0.99, 3, CPU, hours=2),
    "gpu": Budget(200, (50, 100, 150, 200), 0.999, 3, (), full=True),
    "quick": Budget(1, (1,), 0.99, 1, (*CPU, "--warmup_epochs", "0", "--data.profile.largest", "100")),
}


def methods(budget: Budget, dataset: str) -> dict[str, tuple[str, ...]]:
    """Options of each method compared, beside cross-entropy and CIBL, which the sweep over λ has."""
    temperature = 1.0 if dataset == "cifar10" else 0.1  # of the prototypes, as Wang et al. 2021 set it
    hybrid = HYBRID if budget.full else ()
    return {
        "balanced softmax": ("--loss", "{kind: balanced_softmax}"),
        "Hybrid-SC": (*hybrid, "--loss", "{kind: hybrid_sc}"),
        "Hybrid-PSC": (*hybrid, "--loss", f"{{kind: hybrid_psc, temperature: {temperature}}}"),
        "BCL": ("--loss", "{kind: bcl}"),
        "PaCo": ("--loss", f"{{kind: paco, momentum: {budget.averaging}}}"),
    }


@dataclass(frozen=True)
class Cell:
    """One run: a dataset, what is asked (lambda, method, cosine or reading), the value, the seed, and its options."""

    dataset: str
    claim: str
    value: str
    seed: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        value = self.value.replace(", λ = ", "-").replace(" ", "_")
        return f"{self.dataset}-{self.claim}-{value}-{self.seed}"


def cells(budget: Budget, datasets: list[str]) -> list[Cell]:
    """Every run of a budget, first seeds first, so that a stopped measurement has something to say of each question."""
    listed = []
    for seed in range(budget.seeds):
        for dataset in datasets:
            length = ("--epochs", str(budget.epochs))
            for tail_skew in LAMBDAS:
                loss = f"{{kind: cibl, tail_skew: {tail_skew}}}"
                listed.append(Cell(dataset, "lambda", str(tail_skew), seed, ("--loss", loss, *length)))
            for method, options in methods(budget, dataset).items():
                listed.append(Cell(dataset, "method", method, seed, (*options, *length)))
            for epochs in budget.cosine:
                options = ("--head", "{kind: cosine}", "--loss", "{kind: cibl, tail_skew: 0.05}", "--epochs", str(epochs))
                listed.append(Cell(dataset, "cosine", str(epochs), seed, options))
        if seed == 0:
            listed += _readings(budget)
    return listed


def _readings(budget: Budget) -> list[Cell]:
    listed = []
    for reading, option in READINGS.items():
        for tail_skew in READ_AT:
            loss = f"{{kind: cibl, tail_skew: {tail_skew}, {option}}}"
            options = ("--loss", loss, "--epochs", str(budget.epochs))
            listed.append(Cell("cifar100", "reading", f"{reading}, λ = {tail_skew}", 0, options))
    return listed
