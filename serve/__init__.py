"""An exported bundle behind HTTP, or alone on an edge device. No torch here."""

import os
import sys
from pathlib import Path

# `python -m serve` puts the working folder first on the path. A folder `pipelines` there must not be taken for ours.
if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()] != [str(Path(__file__).resolve().parent.parent)]:  # noqa: PTH109
    del sys.path[0]
