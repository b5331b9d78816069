"""cibl-ray: train, evaluate and export classifiers for long-tailed images.

Importing this package is fast. torch and FFCV are imported when one of the names below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cibl_ray.api import Prediction, Run, UserError, fit, load_config, open_run

__version__ = "0.2.0"

__all__ = ["Prediction", "Run", "UserError", "fit", "load_config", "open_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("cibl_ray.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
