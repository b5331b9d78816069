"""The tail shift that a run's validation images chose."""

from __future__ import annotations

import json
from pathlib import Path

from cibl_ray.run.folder import RESULT


def chosen_shift(checkpoint: Path) -> float:
    """Read the shift that was chosen for a checkpoint of a run folder; 0 where none was.

    Args:
        checkpoint: RUN/checkpoints/best.safetensors, or last.
    """
    try:
        result = json.loads((checkpoint.absolute().parent.parent / RESULT).read_text())
        return float(result[checkpoint.stem]["tail_shift"]["shift"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
