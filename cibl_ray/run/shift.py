"""The tail shift: the one that a run's validation images chose, and the one that a command line asks for."""

from __future__ import annotations

import argparse
import json
import logging
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from cibl_ray.bundle.card import MAX_SHIFT
from cibl_ray.run.folder import BEST, BEST_RESULT, LAST, RESULT, is_run
from pipelines.common.errors import UserError, shown

log = logging.getLogger(__name__)


def chosen_shift(checkpoint: Path, asked: bool = False) -> float:
    """Read the shift that was chosen for a checkpoint of a run folder, or for a sweep's best one.

    Args:
        checkpoint: RUN/checkpoints/best.safetensors, or last; or SWEEP/best.safetensors.
        asked: The user asked for the shift that was chosen.

    Returns:
        The shift; 0 where none was chosen. A warning says so where the run has no result that can be read, or where it was
        asked for.
    """
    try:
        found = recorded_shift(checkpoint)
        why = "the checkpoint is not in its run's folder, or the run has no validation images beside its test images"
        tell = asked
    except LookupError as error:
        found, why, tell = None, str(error), True
    if found is None and tell:
        log.warning("the tail shift is 0: %s", why)
    return 0.0 if found is None else float(found["shift"])


def recorded_shift(checkpoint: Path) -> dict[str, Any] | None:
    """Read what was chosen for a checkpoint, as `TailShift.dump` wrote it.

    Args:
        checkpoint: As of `chosen_shift`.

    Returns:
        The record; None where none was chosen.

    Raises:
        LookupError: The run has no result that can be read.
    """
    place = checkpoint.absolute()
    folder, path, kind = place.parent.parent, place.parent / BEST_RESULT, "last"  # a sweep keeps its best trial's last epoch
    if checkpoint.name != BEST or not path.is_file():
        path, kind = folder / RESULT, checkpoint.stem
        if checkpoint.name not in (LAST, BEST) or not is_run(folder):
            return None
    try:
        chosen = json.loads(path.read_text()).get(kind, {})
        if "tail_shift" not in chosen:
            return None
        return {**chosen["tail_shift"], "shift": float(chosen["tail_shift"]["shift"])}
    except FileNotFoundError:
        raise LookupError(f"the run is not finished, it has no {RESULT}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LookupError(f"{path} is damaged; resume the run to write it again") from None


def asked_shift(checkpoint: Path, asked: float | Literal["auto"] | None) -> float:
    """The shift that a command uses: its number, or with 'auto' or nothing the one that was chosen for the checkpoint."""
    return chosen_shift(checkpoint, asked == "auto") if asked in (None, "auto") else float(asked)


def shift_or_auto(text: str) -> float | Literal["auto"]:
    """A command line's `--tail-shift`: 'auto', or a number.

    Raises:
        argparse.ArgumentTypeError: It is neither, or the number is out of range.
    """
    if text == "auto":
        return "auto"
    try:
        return checked_shift(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'auto' nor a number from {-MAX_SHIFT:g} to {MAX_SHIFT:g}"
        ) from None


def checked_shift(shift: float) -> float:
    """The tail shift itself.

    Raises:
        UserError: It is out of range, or no number.
    """
    number = isinstance(shift, Real) and not isinstance(shift, bool)
    if not number or not abs(shift) <= MAX_SHIFT:  # false for NaN, too
        limits = f"a number from {-MAX_SHIFT:g} to {MAX_SHIFT:g}"
        raise UserError(f"tail_shift = {shown(shift)}: {limits}; in Python None takes the shift that the run chose")
    return float(shift)
