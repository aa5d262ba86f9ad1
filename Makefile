# Needs python3 (3.11 or newer) and make. Every target that runs Python makes .venv first, from the lock, when it is
# missing or when the lock has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VERSION := 0.9
SOURCES := mover flows benchmarks tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo flows secrets up down e2e test test-slow test-docker test-all bench-rate bench-memory bench-plan bench-prefect bench-daemon-accept bench-daemon-streams bench-daemon-soak lint format types check lock clean

help: ## what can be made
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version)'
	@$(PYTHON) -c 'import ensurepip' || { echo "Python's venv module is incomplete (Debian: apt-get install python3-venv)" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.venv: $(STAMP) ## the virtual environment, from the lock

demo: $(STAMP) ## archive, verify and retrieve a folder with everything embedded (DATA=some/folder)
	$(BIN)/mover demo $(if $(DATA),"$(DATA)")

flows: $(STAMP) ## archive and retrieve a dataset through Prefect and a catalogue, all on this machine (ARGS=--keep: look around)
	$(BIN)/python -m tests.flows_demo $(ARGS)

# Everything on this machine; PRODUCTION=1 takes .env alone. COMPOSE_ENV_FILES, which compose knows as well: other files.
comma := ,
COMPOSE_ENV_FILES ?= .env$(if $(PRODUCTION),,$(comma).development.env)
COMPOSE = SOURCE_REVISION=$$(git rev-parse --short HEAD 2>/dev/null) docker compose \
	$(addprefix --env-file ,$(subst $(comma), ,$(COMPOSE_ENV_FILES)))
# What is being developed is not what the image was made of; a release has a tag of its own, and comes from a registry perhaps.
BUILD = $(if $(findstring .development.env,$(COMPOSE_ENV_FILES)),--build)

secrets: ## create the secrets of the deployment that are missing, in .secrets
	@COMPOSE_ENV_FILES='$(COMPOSE_ENV_FILES)' docker/make-secrets

up: secrets ## start the deployment: containers, configuration, workers, flows (PRODUCTION=1: with .env alone)
	$(COMPOSE) up -d $(BUILD)
	$(COMPOSE) run --rm prefect-config
	$(COMPOSE) up -d prefect-archival-worker
	$(COMPOSE) up -d prefect-retrieval-worker
	$(COMPOSE) run --rm prefect-flows-deployment

down: ## stop the deployment; its state stays (ARGS=-v: nothing stays)
	$(COMPOSE) --profile '*' down --remove-orphans $(ARGS)  # "orphans": runtime containers of flow runs that still work

e2e: ## archive and retrieve a dataset in the deployment that is up, and compare (ARGS=--help)
	$(COMPOSE) run --rm end-to-end-test $(ARGS)

test: $(STAMP) ## the tests that take less than a few minutes
	$(BIN)/pytest -m "not slow" $(ARGS)

test-slow: $(STAMP) ## the long tests
	$(BIN)/pytest -m "slow and not docker" $(ARGS)

test-docker: $(STAMP) ## the tests of the deployment, on a Docker engine
	$(BIN)/pytest -m docker $(ARGS)

test-all: $(STAMP) ## all tests
	$(BIN)/pytest $(ARGS)

SCRIPTS := $(wildcard docker/*.sh docker/rgw/*.sh) docker/backup docker/make-secrets docker/restore docker/rgw/ceph-rgw .ci/run
DOCKERFILES := prefect-runtime.Dockerfile docker/rgw/Dockerfile

lint: $(STAMP) ## ruff, shellcheck, hadolint: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/shellcheck --severity=warning $(SCRIPTS)
	$(BIN)/hadolint $(DOCKERFILES)

format: $(STAMP) ## ruff: apply the format and the safe fixes
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(STAMP) ## mypy, strict, code and tests
	$(BIN)/mypy

bench-rate: $(STAMP) ## rate of archiving beside s5cmd (ARGS=--help)
	$(BIN)/python -m benchmarks.rate $(ARGS)

bench-memory: $(STAMP) ## peak memory of archiving (ARGS=--help)
	$(BIN)/python -m benchmarks.memory $(ARGS)

bench-plan: $(STAMP) ## memory and time of planning a million objects (ARGS=--help)
	$(BIN)/python -m benchmarks.plan_memory $(ARGS)

bench-prefect: $(STAMP) ## what Prefect costs, and the LTS's idle time between datablocks (ARGS=--help)
	$(BIN)/python -m benchmarks.prefect_overhead $(ARGS)

bench-daemon-accept: $(STAMP) ## a burst of jobs for the daemon while it transfers (ARGS=--help)
	$(BIN)/python -m benchmarks.daemon_accept $(ARGS)

bench-daemon-streams: $(STAMP) ## the daemon's event loop with many event streams (ARGS=--help)
	$(BIN)/python -m benchmarks.daemon_streams $(ARGS)

bench-daemon-soak: $(STAMP) ## the daemon's memory and open files over 20 minutes (ARGS=--help)
	$(BIN)/python -m benchmarks.daemon_soak $(ARGS)

check: lint types test ## lint, types, test

# Not in the lock: it writes the lock. Addresses and local paths are kept out, so that the lock fits every index. What is locked
# with extras is listed without them, too: pip before 23.3 takes neither line for the other.
LOCK = $(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links --no-strip-extras pyproject.toml $(UPGRADE)
BOTH = awk 'function end() { printf "%s", entry; if (entry ~ /^[^=]*\[/) { sub(/\[[^]]*\]/, "", entry); printf "%s", entry } entry = "" } \
	/^[a-z0-9]/ { end() } { entry = entry $$0 "\n" } END { end() }'
lock: ## write requirements.lock and requirements-runtime.lock anew (UPGRADE=--upgrade for newer versions)
	test -x $(VENV)-lock/bin/uv || { $(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip install --quiet 'uv>=$(UV_VERSION)'; }
	$(LOCK) --all-extras --output-file requirements.lock
	$(LOCK) --extra flows --extra daemon --extra build --constraints requirements.lock --output-file requirements-runtime.lock
	for lock in requirements.lock requirements-runtime.lock; do $(BOTH) $$lock >$$lock.part && mv $$lock.part $$lock; done
	! grep -nE '://| @ |^-' requirements.lock requirements-runtime.lock

clean: ## remove what was made here
	rm -rf $(VENV) $(VENV)-lock build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
