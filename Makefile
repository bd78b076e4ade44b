# Everything works from a fresh clone: the first target that needs it makes .venv and installs the
# versions pinned in constraints.txt. PYTHON=/path/to/python names the interpreter (3.11 or later),
# ARGS="strategy=fedadam rounds=5" goes to the run.

.DEFAULT_GOAL := help
.PHONY: help run models demo-deployment test test-all chaos lint format install clean
.DELETE_ON_ERROR:

ARGS ?=
MODEL ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FIND_PYTHON = for python in "$(PYTHON)" python3.11 python3.12 python3.13 python3; do \
	[ -n "$$python" ] && "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo "$$python" && break; done

export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(INSTALLED) ## Run the main job: Flower's simulation, 10 clients, real MNIST images
	$(BIN)/python -m fl_app.flower --supernodes 10 $(ARGS)

models: $(INSTALLED) ## Fetch a pretrained model into models/: MiniLM, 83 MB, or MODEL=smollm2, 93 MB
	$(BIN)/python -m clients.fetch $(MODEL)

demo-deployment: $(INSTALLED) ## Run 3 rounds on a real SuperLink and two SuperNodes on loopback
	$(BIN)/python -m fl_app.flower --deployment --supernodes 2 \
		task=digits num_clients=2 rounds=3 run_name=demo-deployment resume=never $(ARGS)

# Counting lines makes our own code take twice as long (CPython 3.11), so that `test-all` alone does it.
test: lint ## Check style, types and imports, then run all but the slow tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup -m "not slow"

test-all: lint ## The same with the slow tests (Ray, real deployments, long statistics) and coverage
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup --cov --cov-fail-under=95

chaos: $(INSTALLED) ## Kill processes, cut networks, fill disks, set clocks wrong; root for all of it
	OMP_NUM_THREADS=1 $(BIN)/pytest -m chaos tests/chaos --durations=0

lint: $(INSTALLED) ## Check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED) ## Make .venv with the pinned dependencies

$(INSTALLED): pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -x $(BIN)/python ]; then exit 0; \
	elif [ -z "$$python" ]; then \
		echo "No Python 3.11 or later with venv was found: install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; \
	else echo "Making $(VENV) with $$python"; "$$python" -m venv $(VENV); fi
	@echo "Installing the versions pinned in constraints.txt; the first time takes some minutes."
	@# The build back end comes first and is pinned too: no isolated build that fetches its own.
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools hatchling editables
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

clean: ## Remove caches and what Flower left; .venv and runs/ stay
	rm -rf .flwr .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
