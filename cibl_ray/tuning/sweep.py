"""What a sweep file says, and how its trials are compared. Knows no Ray."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from cibl_ray.config import RunConfig, build_config
from pipelines.common.errors import UserError
from pipelines.common.settings import Settings, find_config, known_keys, override, read_config, validate
from pipelines.prepare.pictures import GROUPS, THIRDS

Metric = Literal[
    "overall", "balanced", "many", "medium", "few", "head", "middle", "tail", "worst", "harmonic", "calibration_error", "loss"
]
METRICS: tuple[str, ...] = get_args(Metric)
_SMALL = ("loss", "calibration_error")  # the smaller the better
_WORST = 1e9  # of what the search optimises: of a score that is no number
_BASE = "base_content"


class Range(Settings):
    """Numbers from `low` to `high`: evenly, evenly in the logarithm, or whole ones evenly."""

    kind: Literal["uniform", "log_uniform", "integer"]
    low: float
    high: float

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
    """YAML 1.1 reads 1e-3 as a word; people mean the number, and the report compares and draws it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class Choice(Settings):
    kind: Literal["choice"]
    values: tuple[Annotated[Any, BeforeValidator(_number)], ...] = Field(min_length=1)


Space = Annotated[Range | Choice, Field(discriminator="kind")]


class Objective(Settings):
    """A score of the validation split, after a trial's last epoch."""

    metric: Metric = "balanced"
    mode: Literal["max", "min"] = Field(
        default_factory=lambda given: "min" if given.get("metric") in _SMALL else "max",
        description="by default as the metric is meant: small losses and errors, large accuracies",
    )

    @model_validator(mode="after")
    def _meant(self) -> Objective:
        if self.metric in _SMALL and self.mode == "max":
            raise ValueError(f"mode 'max' looks for the largest {self.metric}, which is the worst; leave mode out")
        return self


class Bound(Settings):
    """Trials that do not keep it rank behind all that do."""

    metric: Metric
    at_least: float | None = Field(default=None, ge=0, le=1)
    at_most: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _meant(self) -> Bound:
        wanted, other = ("at_most", "at_least") if self.metric in _SMALL else ("at_least", "at_most")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"a bound of {self.metric} is `{wanted}: VALUE` alone")
        return self

    def short(self, score: float) -> float:
        """How far a score is from keeping it; 0 or less: it does."""
        return score - self.at_most if self.at_most is not None else (self.at_least or 0.0) - score


class AshaConfig(Settings):
    """Stop trials that are behind: after `grace` epochs, and at each multiple by `reduction`, one in `reduction` goes on."""

    grace: int = Field(default=1, ge=1)
    reduction: int = Field(default=3, ge=2)


class SweepConfig(Settings):
    base: str = Field(default="quickstart", description="a configuration: file or shipped name")
    set: dict[str, Any] = Field(default={}, description="fields of every trial, by dotted name")
    search: dict[str, Space] = Field(default={"loss.tail_skew": Range(kind="log_uniform", low=0.005, high=5)}, min_length=1)
    trials: int = Field(default=20, ge=1, le=10_000)
    algorithm: Literal["tpe", "random", "nsga2"] = "tpe"
    objective: tuple[Objective, ...] = Field(default=(Objective(),), min_length=1, max_length=2)
    bound: Bound | None = None
    asha: AshaConfig | None = AshaConfig()
    concurrent: int | None = Field(default=None, ge=1, description="trials at a time; None: what the cluster has room for")
    workers: int = Field(default=1, ge=1, description="of each trial")
    cpus: int = Field(default=1, ge=1, description="of each worker")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="of the search; the trials' own is in the configuration")

    @model_validator(mode="after")
    def _known(self) -> SweepConfig:
        keys = known_keys(RunConfig)
        for key in (*self.set, *self.search):
            if key not in keys:
                raise ValueError(f"{key!r} is no field of a run's configuration")
        for key in self.set:
            if key in self.search:
                raise ValueError(f"{key!r} is in `set` and in `search`; take it out of one of them")
        if self.bound is not None and len(self.objective) > 1:
            raise ValueError("a bound belongs to one objective; two objectives have their front")
        if self.asha is not None and len(self.objective) > 1:
            raise ValueError("two objectives cannot be stopped early by one of them: set asha: null")
        return self


@dataclass(frozen=True)
class Trial:
    """params: by dotted name. state: 'completed', 'stopped' (by ASHA) or 'failed'. scores: on validation, after `epochs`."""

    name: str
    params: dict[str, Any]
    state: str
    epochs: int
    scores: dict[str, float]
    error: str | None = None


def load_sweep(name: str, pairs: list[str]) -> SweepConfig:
    """A sweep file, or a shipped one's name, with `--field value` overrides. Raises UserError."""
    from pipelines.common.settings import parse_overrides

    path = find_config(name)
    content = override(read_config(path), parse_overrides(pairs, SweepConfig), SweepConfig)
    sweep = validate(SweepConfig, content, str(path))
    base = Path(sweep.base)
    # Going on must work from any folder.
    return sweep.model_copy(update={"base": str(base.absolute())}) if base.is_file() else sweep


def sweep_text(sweep: SweepConfig, base: dict[str, Any]) -> str:
    """What a sweep's folder keeps of it: all trials start from the base as it was when the first one did."""
    return json.dumps({**sweep.model_dump(mode="json"), _BASE: base}, indent=1)


def read_sweep(path: Path) -> tuple[SweepConfig, dict[str, Any] | None]:
    """(the sweep, the configuration that its trials start from: None where an earlier version began it). Raises UserError."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    base = content.pop(_BASE, None) if isinstance(content, dict) else None
    return validate(SweepConfig, content, str(path)), base


def base_content(sweep: SweepConfig) -> dict[str, Any]:
    """The configuration that every trial starts from, with absolute paths: trials run in other folders and on other machines.

    Raises UserError where it is not a valid one with the first parameters of the search, or the search has impossible values.
    """
    path = find_config(sweep.base)
    content = override(read_config(path), [*sweep.set.items()], RunConfig)
    first = {key: _ends(space)[0] for key, space in sweep.search.items()}
    place = f"{path} with {json.dumps({**sweep.set, **first})}"
    base = build_config(override(content, [*first.items()], RunConfig), [], place)
    _check_space(sweep, content)
    return base.model_dump(mode="json")


def _ends(space: Range | Choice) -> tuple[Any, Any]:
    """The first and the last value."""
    if isinstance(space, Choice):
        return space.values[0], space.values[-1]
    return (int(space.low), int(space.high)) if space.kind == "integer" else (space.low, space.high)


def _tried(space: Range | Choice) -> list[tuple[Any, str]]:
    """(value, what to do where no trial can have it): every choice; of a range its ends, and one within that is not whole."""
    if isinstance(space, Choice):
        return [(value, "leave it out of values") for value in space.values]
    low, high = _ends(space)
    tried = [(low, "raise low"), (high, "lower high")]
    if space.kind == "integer":
        return tried
    middle = (low + high) / 2
    broken = math.floor(middle) + 0.5
    return [*tried, (broken if low < broken < high else middle, "search whole numbers with kind: integer")]


def _check_space(sweep: SweepConfig, content: dict[str, Any]) -> None:
    """Raise UserError where the search has a value that no trial can have, whether the other keys have their first or last."""
    others = [{key: _ends(space)[end] for key, space in sweep.search.items()} for end in (0, 1)]
    for key, space in sweep.search.items():
        for value, fix in _tried(space):
            wrong = [_problem(content, {**other, key: value}, f"search.{key}, value {value!r}") for other in others]
            if all(wrong):
                raise UserError(f"{wrong[0]}; {fix}")


def _problem(content: dict[str, Any], params: dict[str, Any], place: str) -> str | None:
    try:
        build_config(override(content, [*params.items()], RunConfig), [], place)
    except UserError as error:
        return str(error)
    return None


def most_epochs(sweep: SweepConfig, base: dict[str, Any]) -> int:
    """Epochs of the longest trial."""
    space = sweep.search.get("train.epochs")
    if space is None:
        return int(base["train"]["epochs"])
    return int(max(space.values) if isinstance(space, Choice) else space.high)


def trial_config(base: dict[str, Any], params: dict[str, Any]) -> RunConfig:
    """The configuration of one trial. Raises UserError where it is not a valid one."""
    return build_config(override(base, [*params.items()], RunConfig), [], f"a trial with {json.dumps(params)}")


def check_metrics(sweep: SweepConfig, groups: set[str], has_validation: bool) -> None:
    """Raise UserError where trials could not be compared. groups: of `GROUPS` and `THIRDS` those with a class that validation
    has images of."""
    if not has_validation:
        raise UserError(
            f"{sweep.base} has no validation split, and a sweep must not choose on the test set; set data.val_fraction: 0.1"
        )
    for metric in _compared(sweep):
        if metric in (*GROUPS, *THIRDS) and metric not in groups:
            thirds = [third for third in THIRDS if third in groups]
            others = f"{', '.join(thirds)} (thirds of the classes)" if thirds and metric in GROUPS else "balanced or worst"
            raise UserError(f"{sweep.base} has no validation images of a class in the group {metric!r}; use {others}")


def _compared(sweep: SweepConfig) -> list[str]:
    """The scores that decide."""
    wanted: list[str] = [one.metric for one in sweep.objective]
    return wanted if sweep.bound is None else [*wanted, sweep.bound.metric]


def trial_name(params: dict[str, Any]) -> str:
    """The same for the same parameters, so that an interrupted trial finds its folder again."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]


def objectives(sweep: SweepConfig, scores: dict[str, float]) -> list[float]:
    """What the search optimises. A bound that is not kept costs 1 and the distance: such trials come behind all others, but for
    those with a score that is not finite."""
    if not _comparable(sweep, scores):
        return [-_WORST if objective.mode == "max" else _WORST for objective in sweep.objective]
    values = []
    for objective in sweep.objective:
        value = _score(scores, objective.metric)
        if sweep.bound is not None:
            short = sweep.bound.short(_score(scores, sweep.bound.metric))
            worst = -1.0 if objective.mode == "max" else 1e3
            if short > 0:
                value = worst - short if objective.mode == "max" else worst + short
        values.append(min(max(value, -_WORST), _WORST))
    return values


def _comparable(sweep: SweepConfig, scores: dict[str, float]) -> bool:
    """Whether all scores that decide are finite."""
    return all(math.isfinite(_score(scores, metric)) for metric in _compared(sweep))


def _score(scores: dict[str, float], metric: str) -> float:
    if metric not in scores:
        raise UserError(
            f"the validation split has no {metric!r} accuracy (no class of that group); there are: {', '.join(scores)}"
        )
    return scores[metric]


def best(sweep: SweepConfig, trials: list[Trial]) -> Trial | None:
    """The best by the first objective, of those that have been trained to the end if there is one. Scores are finite."""
    scored = [trial for trial in trials if trial.scores and _comparable(sweep, trial.scores)]
    ended = [trial for trial in scored if trial.state == "completed"] or scored
    sign = 1 if sweep.objective[0].mode == "max" else -1
    return max(ended, key=lambda trial: sign * objectives(sweep, trial.scores)[0], default=None)


def axes(sweep: SweepConfig, trials: list[Trial]) -> tuple[str, str]:
    """The two scores of the trade-off: the two objectives, or many and few; head and tail where a group has no class; balanced
    and worst where a third has none either, as with two classes."""
    if len(sweep.objective) == 2:
        return sweep.objective[0].metric, sweep.objective[1].metric
    pairs = (("many", "few"), ("head", "tail"))
    return next((pair for pair in pairs if all({*pair} <= trial.scores.keys() for trial in trials)), ("balanced", "worst"))


def front(points: np.ndarray) -> np.ndarray:
    """Which of points (N, 2) are on the Pareto front: no other is larger in one coordinate and as large in the other. One that
    is not finite is on none."""
    at_least = np.all(points[None] >= points[:, None], axis=2)
    better = np.any(points[None] > points[:, None], axis=2)
    on_front: np.ndarray = ~np.any(at_least & better, axis=1) & np.isfinite(points).all(axis=1)
    return on_front


def read_trials(folder: Path) -> list[Trial]:
    """The trials of a sweep folder that have ended. A last line that a kill cut short is left out."""
    path = folder / "trials.jsonl"
    trials = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            trials.append(Trial(**json.loads(line)))
        except json.JSONDecodeError:
            break
    return trials
