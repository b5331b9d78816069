# Two commands are enough on a fresh machine: `make quickstart` and `make test`. Both set up first; a second run skips that.
VENV := .venv/bin/python

.PHONY: help setup quickstart test test-all test-hosts test-ray lint lock wheel web docs docs-serve tables

help:
	@echo "make quickstart   set up, train CIBL on long-tailed digits through FFCV, pictures in runs/"
	@echo "make test         set up, lint, types, tests"
	@echo "make test-all     the same with the slow tests, which take minutes each"
	@echo "make test-hosts   two hosts as network namespaces: what is lost, cut, full or wrong between them (as root)"
	@echo "make test-ray     tests of clusters, sweeps and the service with another release of Ray: VERSION=2.59.0"
	@echo "make setup        Debian packages (as root), virtual environment, pinned packages, onnxruntime-web (with npm)"
	@echo "make docs         build the documentation site into build/docs; a broken link or a missing page is an error"
	@echo "make docs-serve   the site on 127.0.0.1:8001, built again at each change"
	@echo "make tables       draw the tables of the docs again from the recorded lines"
	@echo "make wheel        build the wheel into dist/"
	@echo "make web          fetch onnxruntime-web with npm, for models in the browser, if make setup could not"
	@echo "make lock         resolve requirements.lock again"

setup:
	@PYTHON="$(PYTHON)" sh scripts/setup.sh

quickstart: setup
	$(VENV) -m cibl_ray.train quickstart

lint: setup
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

PYTEST := $(VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "not gpu and not hosts"

# One after another: each test has the machine's two cores as two hosts.
test-hosts: setup
	$(VENV) -m pytest -rsP -m hosts tests/hosts

test-ray: setup
	@sh scripts/test_ray.sh "$(VERSION)"

lock: setup
	$(VENV) -m pip install --quiet uv
	.venv/bin/uv pip compile --quiet --universal --no-emit-index-url --no-annotate --no-header --all-extras \
		--python-version 3.11 pyproject.toml -o requirements.lock

wheel: setup
	$(VENV) -m pip wheel --quiet --no-deps --wheel-dir dist .

web: setup
	$(VENV) -m serve.page.ort

docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV) -m mkdocs build

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(VENV) -m mkdocs serve --dev-addr 127.0.0.1:8001

tables: setup
	$(VENV) -m scripts.docs_site.tables
