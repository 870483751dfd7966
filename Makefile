# Two commands set everything up on a fresh machine and need nothing but python3 (3.11 or newer, see constraints.txt):
#   make demo   fine-tunes a real encoder on real sentences with the callback, in its own environment
#   make test   runs the whole test suite, in its own environment
# A second run installs nothing, unless pyproject.toml or constraints.txt changed.
#   make demo DEMO_ARGS="--epochs 1 --output my-runs"        passes options on to the example
#   make test TEST_ARGS="-k rollout -x"                      passes options on to pytest

PYTHON ?= python3
DEMO_ARGS ?=
STUDY_ARGS ?=
COMPARE_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
VERSIONS_ARGS ?=
LIGHTNING_ARGS ?=

DEMO_ENV := .venv-demo
TEST_ENV := .venv-test
LIGHTNING_ENV := .venv-lightning
LOGGERS_ENV := .venv-loggers
READERS_ENV := .venv-readers
DEMO_READY := $(DEMO_ENV)/.ready
TEST_READY := $(TEST_ENV)/.ready
LIGHTNING_READY := $(LIGHTNING_ENV)/.ready
LOGGERS_READY := $(LOGGERS_ENV)/.ready
READERS_READY := $(READERS_ENV)/.ready

# torch is named once more on the command line: the pin then also decides between builds of one version.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
LIGHTNING := $(shell sed -n 's/^pytorch-lightning==/lightning==/p' constraints.txt)
INSTALL := -m pip install --quiet --constraint constraints.txt $(TORCH) --editable

.DEFAULT_GOAL := help
.PHONY: help demo study compare test lightning loggers readers versions docs lint format types ci clean

help: ## show these commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(DEMO_READY) ## fine-tune a real encoder with the callback (a few minutes)
	$(DEMO_ENV)/bin/python examples/finetune_sentiment.py $(DEMO_ARGS)

study: $(DEMO_READY) ## fine-tune with three seeds, record them and compare them (some minutes)
	$(DEMO_ENV)/bin/python examples/study_seeds.py $(STUDY_ARGS)

compare: $(DEMO_READY) ## fine-tune, and compare GlobEnc with its rivals on held-out sentences (some minutes)
	$(DEMO_ENV)/bin/python examples/compare_methods.py $(COMPARE_ARGS)

test: $(TEST_READY) ## run the whole test suite
	OMP_NUM_THREADS=1 $(TEST_ENV)/bin/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

lightning: $(LIGHTNING_READY) ## run the callback's tests with lightning and without pytorch_lightning
	$(LIGHTNING_ENV)/bin/python tests/lightning_package.py $(LIGHTNING_ARGS)

loggers: $(LOGGERS_READY) ## run the tests that need the packages behind other loggers (MLflow, W&B), offline
	GLOBENC_LOGGERS=required $(LOGGERS_ENV)/bin/python -m pytest tests/report/test_loggers.py

readers: $(READERS_READY) ## run the tests that read a record with other packages (polars, DuckDB)
	GLOBENC_READERS=required $(READERS_ENV)/bin/python -m pytest tests/record/test_readers.py

versions: ## run the tests with the oldest, the pinned and the newest of all it needs; before a release
	$(PYTHON) tests/versions.py $(VERSIONS_ARGS)

docs: $(TEST_READY) ## build the pages of docs/ and the reference into docs/_build
	$(TEST_ENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build

lint: $(TEST_READY) ## check style, formatting and which module imports which
	$(TEST_ENV)/bin/python -m ruff check .
	$(TEST_ENV)/bin/python -m ruff format --check .
	$(TEST_ENV)/bin/lint-imports

format: $(TEST_READY) ## put style and formatting right where a tool can
	$(TEST_ENV)/bin/python -m ruff check --fix .
	$(TEST_ENV)/bin/python -m ruff format .

types: $(TEST_READY) ## check the type hints
	$(TEST_ENV)/bin/python -m mypy

ci: ## everything that a change has to pass
	bash .ci/run

clean: ## remove the environments and the tools' caches
	rm -rf docs/_build $(DEMO_ENV) $(TEST_ENV) $(LIGHTNING_ENV) $(LOGGERS_ENV) $(READERS_ENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_ENV)
	$(DEMO_ENV)/bin/python $(INSTALL) ".[examples,record]"
	@touch $@

$(TEST_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST_ENV)
	$(TEST_ENV)/bin/python $(INSTALL) ".[dev]"
	@touch $@

# pip's lightning asks for pytorch-lightning; of the two, this environment has the one alone.
$(LIGHTNING_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LIGHTNING_ENV)
	$(LIGHTNING_ENV)/bin/python $(INSTALL) ".[test]"
	$(LIGHTNING_ENV)/bin/python -m pip uninstall --quiet --yes pytorch-lightning
	$(LIGHTNING_ENV)/bin/python -m pip install --quiet --no-deps $(LIGHTNING)
	@touch $@

$(LOGGERS_READY): pyproject.toml constraints.txt constraints-loggers.txt
	$(PYTHON) -m venv $(LOGGERS_ENV)
	$(LOGGERS_ENV)/bin/python $(INSTALL) ".[test,loggers]" --constraint constraints-loggers.txt
	@touch $@

$(READERS_READY): pyproject.toml constraints.txt constraints-readers.txt
	$(PYTHON) -m venv $(READERS_ENV)
	$(READERS_ENV)/bin/python $(INSTALL) ".[test,readers]" --constraint constraints-readers.txt
	@touch $@
