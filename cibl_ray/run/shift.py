"""The tail shift that a run's validation images chose."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from cibl_ray.run.folder import BEST, LAST, RESULT, is_run

log = logging.getLogger(__name__)


def chosen_shift(checkpoint: Path) -> float:
    """Read the shift that was chosen for a checkpoint of a run folder.

    Args:
        checkpoint: RUN/checkpoints/best.safetensors, or last.

    Returns:
        The shift; 0 where none was chosen. A warning says so where the run has no result that can be read.
    """
    folder = checkpoint.absolute().parent.parent
    if checkpoint.name not in (LAST, BEST) or not is_run(folder):
        return 0.0
    path = folder / RESULT
    try:
        result = json.loads(path.read_text())
        chosen = result.get(checkpoint.stem, {})
        return float(chosen["tail_shift"]["shift"]) if "tail_shift" in chosen else 0.0
    except FileNotFoundError:
        reason = f"the run is not finished, it has no {RESULT}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        reason = f"{path} is damaged; resume the run to write it again"
    log.warning("the tail shift is 0: %s", reason)
    return 0.0
