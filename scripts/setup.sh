#!/bin/sh
# Everything a command of this project needs, on Debian 12, Ubuntu and their like: `make setup` calls it.
#   1. the Debian packages with which FFCV compiles (installed as root, named otherwise)
#   2. Chromium and npm, for the tests of the service's page (as root, on Debian; skipped elsewhere, and the tests with them)
#   3. a virtual environment in .venv
#   4. the packages pinned in requirements.lock
#   5. onnxruntime-web, for models in the browser (with npm, pinned by its own lock file; skipped without it, and its tests)
# What is already done is skipped. Where FFCV cannot be built the set-up continues: training then uses the torchvision loader.
# PYTHON=/path/to/python3 chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

for python in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
  [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 || continue
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  python=
done
[ -n "$python" ] || fail "Python 3.11 or newer is needed; install it (apt-get install python3) or name it: make PYTHON=/path/to/python3"

has() { "$python" -c "$1" >/dev/null 2>&1; }
find_missing() { # what this machine lacks: for a virtual environment in $venv, for FFCV in $missing
  venv= missing=
  has 'import ensurepip' || venv=python3-venv
  has 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' || missing="$missing python3-dev"
  command -v g++ >/dev/null || missing="$missing g++"
  command -v pkg-config >/dev/null || missing="$missing pkg-config"
  pkg-config --exists opencv4 2>/dev/null || missing="$missing libopencv-dev"
  pkg-config --exists libturbojpeg 2>/dev/null || missing="$missing libturbojpeg0-dev"
}
find_missing

# The stamp names all that the environment was made from. A matching one means there is nothing to do.
stamp() { { cat requirements.lock pyproject.toml scripts/setup.sh; grep __version__ cibl_ray/__init__.py; "$python" -V; echo "$missing"; } | sha256sum | cut -c1-16; }
[ -x .venv/bin/python ] && [ "$(cat .venv/.setup 2>/dev/null)" = "$(stamp)" ] && exit 0

if [ -n "$venv$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  say "installing Debian packages: $venv$missing"
  log=$(mktemp)
  # shellcheck disable=SC2086  # a list of words on purpose
  if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $venv $missing; } \
    >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    say "apt-get failed (the lines above say why)"
  fi
  rm -f "$log"
  find_missing
fi
if [ -n "$venv" ] && [ ! -x .venv/bin/pip ]; then
  fail "a virtual environment needs a package that only an administrator can install: apt-get install -y $venv$missing"
fi
has_browser() { command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; }
page=
has_browser || page=chromium
command -v npm >/dev/null || page="$page npm"
# Elsewhere the package chromium installs a snap, which containers cannot run.
if [ -n "$page" ] && [ "$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release; then
  say "installing Debian packages for the tests of the page: $page"
  # shellcheck disable=SC2086  # as above
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $page; } >/dev/null 2>&1 || :
fi
has_browser || say "without Chromium the tests of the page in a browser are skipped"
ffcv=,ffcv
if [ -n "$missing" ]; then
  say "FFCV needs packages that only an administrator can install. Ask for:"
  say "    apt-get install -y --no-install-recommends$missing"
  say "going on without FFCV: training will use the torchvision loader"
  ffcv=
fi

version=$("$python" -V)
if [ "$(.venv/bin/python -V 2>/dev/null)" != "$version" ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  say "virtual environment in .venv, by $version"
  "$python" -m venv --clear .venv
fi

install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[$1]"; }
say "installing the packages of requirements.lock into .venv (some minutes the first time)"
if [ -z "$ffcv" ] || ! install train,photos,adapters,track,data,cluster,export,serve,docs,dev,ffcv; then
  [ -z "$ffcv" ] || say "FFCV did not build (the lines above say why); going on without it: training will use the torchvision loader"
  install train,photos,adapters,track,data,cluster,export,serve,docs,dev
fi
if ! command -v npm >/dev/null; then
  say "without npm there is no onnxruntime-web: the tests of models in the browser are skipped; install npm, then run: make web"
elif ! reason=$(.venv/bin/python -m serve.page.ort 2>&1 >/dev/null); then
  say "without onnxruntime-web the tests of models in the browser are skipped; for it run: make web ($reason)"
fi
stamp >.venv/.setup
say "done"
