# Everything a machine with Python 3.11+ and make needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# As many tests at a time as there are cores; those of one file one after the other.
PYTEST := $(BIN)/python -m tests.support.lane --numprocesses auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo start check format test test-slow soak build bench-control bench-worker bench-tunnels bench-authentication check-device docs migration clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Repeated only when the dependencies change. Bytecode is compiled now, so that the first start
# is as fast as every other.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gpustack needs Python 3.11 or newer, and $(PYTHON) is not; choose another with:" \
	       "make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu:" \
	       "apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m compileall -q gpustack demo
	@touch $@

install: $(VENV)/.installed ## make .venv with the package and its tools in it

demo: install ## start a node, deploy a model, stream one answer; MODEL=file.gguf or org/repo[:file]
	@exec $(BIN)/python -m demo

start: install ## start a node; its options: make start ARGS='--port 8000'
	exec $(BIN)/gpustack start $(ARGS)

check: install ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## format the code, mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: check ## all that a laptop can show in ten minutes
	$(PYTEST)

test-slow: install ## what takes longer: several hosts, three databases, load, kills, fuzzing
	$(PYTEST) -m "slow and not soak" --timeout 600; code=$$?; [ $$code -eq 5 ] || exit $$code

soak: install ## the full counts
	$(BIN)/python -m pytest -m soak --timeout 36000; code=$$?; [ $$code -eq 5 ] || exit $$code

build: install ## wheel and sdist into dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build

bench-control: install ## what a thousand workers cost the server
	$(BIN)/python -m benchmarks.control

bench-worker: install ## what 64 engines cost their agent
	$(BIN)/python -m benchmarks.worker

bench-tunnels: install ## what a tunnel adds to a request
	$(BIN)/python -m benchmarks.tunnels

bench-authentication: install ## what it costs a gateway to know who asks
	$(BIN)/python -m benchmarks.authentication

check-device: install ## on a machine with NVIDIA cards: what a worker says of them is what nvidia-smi says
	$(BIN)/python -m benchmarks.devices

docs: install ## the reference pages that are made from the code
	$(BIN)/python -m gpustack.config.reference docs

migration: install ## a new database migration: make migration m='add a column'
	@[ -n "$(m)" ] || { echo "say what changes: make migration m='add a column'" >&2; exit 1; }
	mkdir -p build && rm -f build/migrations.db
	$(BIN)/alembic upgrade head
	$(BIN)/alembic revision --autogenerate -m "$(m)"

clean: ## remove what the other targets made
	rm -rf $(VENV) .demo dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
