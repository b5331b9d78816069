"""A sweep, the configurations of its trials, and how trials are compared. Does not use Ray."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from cibl_ray.config import RunConfig, build_config, with_recipe
from cibl_ray.tuning.config import Choice, Range, SweepConfig
from pipelines.common.config_file import find_config, folder_of_paths, read_content, written_out
from pipelines.common.errors import UserError
from pipelines.common.settings import build, override, parse_overrides
from pipelines.prepare.shots import GROUPS, THIRDS

_WORST = 1e9  # what the search optimises where a score is not finite


@dataclass(frozen=True)
class Trial:
    """A trial that has ended.

    Attributes:
        name: Of its folder.
        params: Values of the searched fields, by dotted name.
        state: 'completed', 'stopped' (by ASHA) or 'failed'.
        epochs: Epochs that it trained.
        scores: On the validation split, after these epochs.
        error: Why it failed.
    """

    name: str
    params: dict[str, Any]
    state: str
    epochs: int
    scores: dict[str, float]
    error: str | None = None


def load_sweep(name: str, pairs: list[str]) -> SweepConfig:
    """Load a sweep.

    Args:
        name: A sweep file, or the name of a shipped one.
        pairs: `--field value` of the command line.

    Raises:
        UserError: The file cannot be read, or a value is invalid.
    """
    path = find_config(name)
    content = read_content(path, SweepConfig)
    pairs, of_trials = _split_overrides(pairs)
    _refuse_fields_of_trials(pairs)
    flags = dict(parse_overrides(of_trials, RunConfig))
    given = content.get("set")
    if given is None:  # `set:` with all its lines commented out
        given = content["set"] = {}
    if isinstance(given, dict):  # `build` refuses anything else
        content["set"] = {**given, **flags}
    beside = path.absolute().parent / str(content.get("base", ""))
    if beside.is_file():  # like every path in a configuration file
        content["base"] = str(beside)
    sweep = build(SweepConfig, content, pairs, str(path))
    base = Path(sweep.base)
    if base.is_file():
        sweep = sweep.model_copy(update={"base": str(base.absolute())})
    replaced = {key for key, _ in parse_overrides(pairs, SweepConfig)}
    return _with_absolute_paths(sweep, path, {*sweep.set} if "set" in replaced else {*flags}, "search" in replaced)


def _with_absolute_paths(sweep: SweepConfig, path: Path, set_keys: set[str], search_given: bool) -> SweepConfig:
    """`sweep` with absolute paths in `set` and `search`, so that it can be resumed from any folder.

    Paths in the sweep file are relative to that file, those of the command line to the working folder.

    Args:
        sweep: The sweep.
        path: The sweep file.
        set_keys: The keys of `set` that the command line gave.
        search_given: Whether the command line gave `search`.
    """
    working = Path.cwd()
    beside = folder_of_paths(path) or working
    # Whether a field is a path depends on the kind of its part, and the base may name that.
    try:
        base = find_config(sweep.base)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from error
    trial = override(read_content(base, RunConfig), [*sweep.set.items()], RunConfig)
    fixed = {
        key: _absolute(key, value, trial, str(path), working if key in set_keys else beside) for key, value in sweep.set.items()
    }
    search: dict[str, Range | Choice] = {}
    for key, space in sweep.search.items():
        if isinstance(space, Choice):
            folder = working if search_given else beside
            values = tuple(_absolute(key, value, trial, str(path), folder) for value in space.values)
            search[key] = space.model_copy(update={"values": values})
        else:
            search[key] = space
    return sweep.model_copy(update={"set": fixed, "search": search})


def _absolute(key: str, value: Any, trial: dict[str, Any], place: str, folder: Path) -> Any:
    """A field's value with relative paths below `folder`. trial: a configuration, for the kinds of the parts around it."""
    names = key.split(".")
    parts: list[Any] = [trial]
    for name in names[:-1]:
        parts.append(parts[-1].get(name) if isinstance(parts[-1], dict) else None)
    content = value
    for name, part in zip(reversed(names), reversed(parts), strict=True):
        kind = {"kind": part["kind"]} if isinstance(part, dict) and "kind" in part else {}
        content = {**kind, name: content}
    content = written_out(content, RunConfig, place, folder)
    for name in names:
        content = content[name]
    return content


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments for the sweep, and those of `--set.FIELD VALUE` for its trials, as `--FIELD VALUE`."""
    own: list[str] = []
    of_trials: list[str] = []
    queue = iter(arguments)
    for argument in queue:
        chosen = of_trials if argument.startswith("--set.") else own
        chosen.append(argument.replace("--set.", "--", 1) if chosen is of_trials else argument)
        if argument.startswith("--") and "=" not in argument:
            chosen += [*islice(queue, 1)]
    return own, of_trials


def _refuse_fields_of_trials(arguments: list[str]) -> None:
    """Raise UserError, with the option that is meant, for `--FIELD VALUE` of a field that trials have and the sweep has not."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for flag in flags:
        if _key(flag, SweepConfig) is None and (key := _key(flag, RunConfig)) is not None:
            raise UserError(f"{flag}: unknown field of a sweep; did you mean --set.{key}?")


def _key(flag: str, model: type[BaseModel]) -> str | None:
    """The dotted name of the field that `flag` sets; None where the model has none of that name."""
    try:
        return parse_overrides([flag, "null"], model)[0][0]
    except UserError:
        return None


def base_content(sweep: SweepConfig) -> dict[str, Any]:
    """The configuration that every trial starts from. Its paths are absolute: trials run in other folders and on other nodes.

    Raises:
        UserError: It is not valid with the first values of the search, or a searched value is never valid.
    """
    path = find_config(sweep.base)
    if "train.tune" in sweep.search:
        raise UserError("search: train.tune decides the recipe, which is one for all trials; make a sweep for each value")
    content = with_recipe(read_content(path, RunConfig), [*sweep.set.items()])
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
    """Values to check, each with its fix: every choice; of a range its ends, and a fraction between them."""
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
    """Raise UserError for a searched value that is not valid with the first values of the other keys, nor with the last."""
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
    """The configuration of one trial.

    Raises:
        UserError: It is not valid.
    """
    return build_config(override(base, [*params.items()], RunConfig), [], f"a trial with {json.dumps(params)}")


def check_metrics(sweep: SweepConfig, groups: set[str], has_validation: bool) -> None:
    """Check that trials can be compared.

    Args:
        sweep: The sweep.
        groups: The groups of `GROUPS` and `THIRDS` that have validation images.
        has_validation: Whether there is a validation split.

    Raises:
        UserError: There is no validation split, or a score that decides has no images.
    """
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
    """The name of a trial. It depends on the parameters alone, so that a resumed trial finds its folder."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]


def objectives(sweep: SweepConfig, scores: dict[str, float]) -> list[float]:
    """The values that the search optimises.

    A trial that misses the bound ranks behind all that meet it: it loses 1 and the distance. A trial with a score that is not
    finite ranks last.

    Args:
        sweep: The sweep.
        scores: Of a trial, by metric.

    Returns:
        One value for each objective.

    Raises:
        UserError: A score is missing.
    """
    if not _comparable(sweep, scores):
        return worst_objectives(sweep)
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


def worst_objectives(sweep: SweepConfig) -> list[float]:
    """The values of a trial that ranks last."""
    return [-_WORST if objective.mode == "max" else _WORST for objective in sweep.objective]


def _comparable(sweep: SweepConfig, scores: dict[str, float]) -> bool:
    """Whether all scores that decide are finite."""
    return all(math.isfinite(_score(scores, metric)) for metric in _compared(sweep))


def _score(scores: dict[str, float], metric: str) -> float:
    if metric not in scores:
        raise UserError(
            f"the validation split has no {metric!r} accuracy (no class of that group); there are: {', '.join(scores)}"
        )
    return scores[metric]


def scored(trials: list[Trial]) -> list[Trial]:
    """The trials whose scores count: one that failed has at most those of an epoch before that."""
    return [trial for trial in trials if trial.scores and trial.state != "failed"]


def best(sweep: SweepConfig, trials: list[Trial]) -> Trial | None:
    """The best trial by the first objective. Trials that ended by themselves come first; None where no score is finite."""
    finite = [trial for trial in scored(trials) if _comparable(sweep, trial.scores)]
    ended = [trial for trial in finite if trial.state == "completed"] or finite
    sign = 1 if sweep.objective[0].mode == "max" else -1
    return max(ended, key=lambda trial: sign * objectives(sweep, trial.scores)[0], default=None)


def axes(sweep: SweepConfig, trials: list[Trial]) -> tuple[str, str]:
    """The two scores of the trade-off picture.

    They are the two objectives, or many and few. If one of these groups is empty, head and tail; if a third is empty too, as
    with two classes, balanced and worst.
    """
    if len(sweep.objective) == 2:
        return sweep.objective[0].metric, sweep.objective[1].metric
    pairs = (("many", "few"), ("head", "tail"))
    return next((pair for pair in pairs if all({*pair} <= trial.scores.keys() for trial in trials)), ("balanced", "worst"))


def front(points: np.ndarray) -> np.ndarray:
    """Find the Pareto front. A point on it is finite, and no other is larger in one coordinate and at least equal in the other.

    Args:
        points: (N, 2); larger is better.

    Returns:
        Whether each point is on the front, bool (N,).
    """
    at_least = np.all(points[None] >= points[:, None], axis=2)
    better = np.any(points[None] > points[:, None], axis=2)
    on_front: np.ndarray = ~np.any(at_least & better, axis=1) & np.isfinite(points).all(axis=1)
    return on_front
