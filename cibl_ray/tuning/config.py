"""The configuration of a sweep."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from cibl_ray.config import RunConfig
from pipelines.common.fields import known_keys, nearest_key
from pipelines.common.settings import Settings

Metric = Literal[
    "overall", "balanced", "many", "medium", "few", "head", "middle", "tail", "worst", "harmonic", "calibration_error", "loss"
]
METRICS: tuple[str, ...] = get_args(Metric)
_SMALL = ("loss", "calibration_error")  # smaller is better


class Range(Settings):
    """Numbers from `low` to `high`: evenly, evenly in the logarithm, or whole ones evenly."""

    kind: Literal["uniform", "log_uniform", "integer"]
    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} must be less than high = {self.high:g}")
        if self.kind == "log_uniform" and self.low <= 0:
            raise ValueError("a log_uniform range begins above 0")
        if self.kind == "integer" and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError("an integer range has whole ends")
        return self


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text. The number is meant; the report compares and draws it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class Choice(Settings):
    """One of the listed values."""

    kind: Literal["choice"]
    values: tuple[Annotated[Any, BeforeValidator(_number)], ...] = Field(min_length=1, description="The values.")


Space = Annotated[Range | Choice, Field(discriminator="kind")]


class Objective(Settings):
    """A score of the validation split, after a trial's last epoch."""

    metric: Metric = Field(default="balanced", description="Score to optimise.")
    mode: Literal["max", "min"] = Field(
        default_factory=lambda given: "min" if given.get("metric") in _SMALL else "max",
        description="By default min for losses and errors, max for accuracies.",
    )

    @model_validator(mode="after")
    def _meant(self) -> Objective:
        if self.metric in _SMALL and self.mode == "max":
            raise ValueError(f"mode 'max' looks for the largest {self.metric}, which is the worst; leave mode out")
        return self


class Bound(Settings):
    """Trials that meet the bound rank first, the rest by how close they come."""

    metric: Metric = Field(description="Score that is bounded.")
    at_least: float | None = Field(default=None, ge=0, le=1, description="Smallest accuracy that is accepted.")
    at_most: float | None = Field(default=None, ge=0, description="Largest loss or error that is accepted.")

    @model_validator(mode="after")
    def _meant(self) -> Bound:
        wanted, other = ("at_most", "at_least") if self.metric in _SMALL else ("at_least", "at_most")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"a bound of {self.metric} is `{wanted}: VALUE` alone")
        return self

    def short(self, score: float) -> float:
        """How far a score misses the bound; 0 or less: it meets it."""
        return score - self.at_most if self.at_most is not None else (self.at_least or 0.0) - score


class AshaConfig(Settings):
    """Stop trials that are behind: after `grace` epochs, and at each multiple by `reduction`, one in `reduction` continues."""

    grace: int = Field(default=1, ge=1, description="Epochs before the first trials are stopped.")
    reduction: int = Field(default=3, ge=2, description="One in this many trials continues.")


class SweepConfig(Settings):
    """A search over the fields of a run's configuration."""

    base: str = Field(default="quickstart", description="Configuration of the trials: a file, or a shipped one's name.")
    set: dict[str, Any] = Field(default={}, description="Fields that every trial has, by dotted name.")
    search: dict[str, Space] = Field(
        default={"loss.tail_skew": Range(kind="log_uniform", low=0.005, high=5)},
        min_length=1,
        description="Fields to search, by dotted name, each with its range or values.",
    )
    trials: int = Field(default=20, ge=1, le=10_000, description="How many trials to run.")
    algorithm: Literal["tpe", "random", "nsga2"] = Field(default="tpe", description="How Optuna proposes values.")
    objective: tuple[Objective, ...] = Field(
        default=(Objective(),), min_length=1, max_length=2, description="Scores to optimise: one, or two with their front."
    )
    bound: Bound | None = None
    asha: AshaConfig | None = AshaConfig()
    concurrent: int | None = Field(
        default=None, ge=1, description="Trials at a time; null: as many as the cluster has room for."
    )
    workers: int = Field(default=1, ge=1, description="Workers of each trial.")
    cpus: int = Field(default=1, ge=1, description="CPUs of each worker.")
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="Seed of the search. The trials' seed is in their configuration."
    )

    @model_validator(mode="after")
    def _known(self) -> SweepConfig:
        keys = known_keys(RunConfig)
        for key in (*self.set, *self.search):
            if key not in keys:
                close = nearest_key(key, keys)
                hint = f"; did you mean {close!r}?" if close else ""
                raise ValueError(f"{key!r} is no field of a run's configuration{hint}")
            if (within := keys[key].in_list) is not None:
                raise ValueError(f"{key!r} is a field within {within!r}, which is set as a whole")
        for key in self.set:
            if key in self.search:
                raise ValueError(f"{key!r} is in `set` and in `search`; take it out of one of them")
        if self.bound is not None and len(self.objective) > 1:
            raise ValueError("a bound belongs to one objective; two objectives have their front")
        if self.asha is not None and len(self.objective) > 1:
            raise ValueError("two objectives cannot be stopped early by one of them: set asha: null")
        return self
