# Everything works from a fresh clone: the first target that needs it makes .venv and installs the
# versions pinned in constraints.txt. PYTHON=/path/to/python names the interpreter (3.11 or later),
# ARGS="strategy=fedadam rounds=5" goes to the run.

.DEFAULT_GOAL := help
.PHONY: help run models demo-deployment demo-secure certs superlink supernode deploy-up deploy-run deploy-status deploy-down test test-all chaos lint format install clean
.DELETE_ON_ERROR:

ARGS ?=
MODEL ?=
NODE ?= 0
NODES ?= 2
SUPERLINK ?= 127.0.0.1:9092
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FIND_PYTHON = for python in "$(PYTHON)" python3.11 python3.12 python3.13 python3; do \
	[ -n "$$python" ] && "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo "$$python" && break; done

STATE := .deployment
CERTS := $(STATE)/certs
# Flower's programs start others, which must be found, and install nothing.
DEPLOYED = PATH="$(CURDIR)/$(BIN):$$PATH" FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
	FLWR_DISABLE_UPDATE_CHECK=1 FLWR_TELEMETRY_ENABLED=0

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

demo-secure: $(INSTALLED) ## The same with TLS and node authentication
	$(BIN)/python -m fl_app.flower --deployment --secure --supernodes 2 \
		task=digits num_clients=2 rounds=3 run_name=demo-secure resume=never $(ARGS)

deploy-up: $(INSTALLED) ## Start a secured SuperLink and NODES=2 SuperNodes here, which run on
	$(BIN)/trellis deploy up --nodes $(NODES) $(ARGS)

deploy-run: $(INSTALLED) ## Run the app on them: ARGS="task=digits num_clients=2 rounds=3"
	$(BIN)/trellis deploy run $(ARGS)

deploy-status: $(INSTALLED) ## Show which of them run
	$(BIN)/trellis deploy status $(ARGS)

deploy-down: $(INSTALLED) ## End them; keys, database and clients' memories stay
	$(BIN)/trellis deploy down $(ARGS)

certs: $(INSTALLED) ## Make keys for NODES=2 nodes: ARGS="--host fl.example.org"
	$(BIN)/trellis certs all $(CERTS) --nodes $(NODES) $(ARGS)

superlink: $(INSTALLED) ## Start a SuperLink for other machines in the foreground
	$(DEPLOYED) FLWR_HOME="$(CURDIR)/$(STATE)/superlink" $(BIN)/trellis superlink --enable-supernode-auth \
		--ssl-ca-certfile $(CERTS)/ca.pem --ssl-certfile $(CERTS)/server.pem --ssl-keyfile $(CERTS)/server.key \
		--host 0.0.0.0 --port 9092 --database $(STATE)/superlink.db $(ARGS)

supernode: $(INSTALLED) ## Start SuperNode NODE=0 of SUPERLINK=host:port in the foreground
	$(DEPLOYED) FLWR_HOME="$(CURDIR)/$(STATE)/node-$(NODE)" $(BIN)/trellis supernode --superlink $(SUPERLINK) \
		--root-certificates $(CERTS)/ca.pem --auth-supernode-private-key $(CERTS)/nodes/node-$(NODE) \
		--port $$((9094 + $(NODE))) --node-config 'partition-id=$(NODE) num-partitions=$(NODES)' $(ARGS)

# Counting lines makes our own code take twice as long (CPython 3.11), so that `test-all` alone does it.
test: lint ## Check style, types and imports, then run all but the slow tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup -m "not slow"

test-all: lint ## The same with the slow tests (Ray, real deployments, long statistics), more examples and coverage
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup --hypothesis-profile=long --cov --cov-fail-under=95

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
