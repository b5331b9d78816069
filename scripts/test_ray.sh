#!/bin/sh
# The tests of clusters, sweeps and the service with another release of Ray: sh scripts/test_ray.sh VERSION. All other packages are those of .venv.
set -eu
version=${1:?usage: sh scripts/test_ray.sh VERSION}
venv=.venv-ray-$version
if [ ! -x "$venv/bin/pytest-ready" ]; then
  .venv/bin/python -m venv "$venv"
  packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "import site; site.addsitedir('$packages')" > "$own/others.pth" # after its own packages
  "$venv/bin/python" -m pip install --quiet --no-deps "ray==$version"
  ln -s python "$venv/bin/pytest-ready"
fi
"$venv/bin/python" -c "import ray; print('Ray', ray.__version__)"
exec "$venv/bin/python" -m pytest tests/cibl_ray/test_progress.py tests/cibl_ray/test_cluster.py tests/cibl_ray/test_nodes.py \
  tests/cibl_ray/test_tune.py tests/serve/test_service.py
