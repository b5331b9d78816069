#!/bin/sh
# One session on a machine with a GPU, torch 2.11 or later and the extra `train`, pytest, pytest-timeout and psutil; neither Ray nor FFCV is needed.
#   sh scripts/gpu_session.sh pack FOLDER ARCHIVE   here: the data, about 50 MB
#   sh scripts/gpu_session.sh run ARCHIVE           there: tests, benchmarks, a whole run and table cells in eight minutes
# PYTHON names the interpreter; by default the one of .venv, else python3. --help says the rest.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
"$python" - "$@" <<'END'
import importlib.util, sys
missing = [name for name in ("torch", "torchvision", "pydantic", "yaml", "safetensors", "matplotlib", "scipy", "tqdm") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}; install them with: {sys.executable} -m pip install '.[train]'")
missing = [name for name in ("pytest", "pytest_timeout", "psutil") if importlib.util.find_spec(name) is None]
if missing and "run" in sys.argv[1:2]:
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}; install them with: {sys.executable} -m pip install pytest pytest-timeout psutil")
import torch
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"error: torch {torch.__version__} is too old; 2.11 or later is needed")
END
exec "$python" -m benchmarks.gpu_session "$@"
