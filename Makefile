# make demo     train a small TokenFormer on the text that every Python carries, and show what it learned
#               (TEXT=my.txt: on your own, in demo-my/; OUTPUT=folder: there; MINUTES=10: a model for that time)
# make test     run the tests (make test-full: the whole of every big matrix; ARGS="tests/unit -k loss": some of them)
# make test-cluster  train under a real Slurm, ssh, pdsh, OpenMPI and MPICH, which this machine must have, and clean up
# make test-transformers  run transformers' own common tests on the modelling file of exports, and on GPTNeoX
# make checks   lint, types, floors, circles, openings of docstrings, modules with a single importer
# make docs     write again what is generated: the tables of keys, the schema, the figures of floors and Pattention
# make site     build the documentation, to be read without a network: build/site/docs/index.html
SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python

# The first Python on the PATH that the pinned packages support; `make PYTHON=...` decides otherwise.
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: demo test test-full test-cluster test-transformers checks format docs site clean
.DELETE_ON_ERROR:

demo: $(VENV)/base.installed
	$(PY) tools/demo.py $(if $(TEXT),--text "$(TEXT)") $(if $(OUTPUT),--output-dir "$(OUTPUT)") \
	  $(if $(MINUTES),--minutes "$(MINUTES)")

# A worker for each core, up to four; tests that read the same runs stay together (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup --durations 10

test: $(VENV)/dev.installed
	$(PYTEST) -m "not full" $(ARGS)

test-full: $(VENV)/dev.installed
	$(PYTEST) $(ARGS)

test-cluster: $(VENV)/dev.installed
	OMP_NUM_THREADS=1 $(PY) -m tests.cluster.run_all $(ARGS)

test-transformers: $(VENV)/dev.installed
	OMP_NUM_THREADS=1 $(PY) tools/checks/run_transformers_tests.py $(ARGS)

checks: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) tools/checks/check_docstrings.py
	$(PY) tools/checks/check_lone_importers.py

format: $(VENV)/dev.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

site: $(VENV)/dev.installed
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going --conf-dir docs . build/site
	@echo "build/site/docs/index.html"

docs: $(VENV)/base.installed
	$(PY) tools/generate_config_docs.py
	$(PY) tools/plots/draw_architecture.py
	$(PY) tools/plots/draw_pattention.py

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/dev.installed: EXTRAS := [dev]

$(VENV)/%.installed: pyproject.toml requirements/constraints.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)' --constraint requirements/constraints.txt
	@touch $@
