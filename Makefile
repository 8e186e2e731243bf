# Thin: each target is a command or two. VENV=dir, PYTHON=python3.12, TORCH='torch==2.13.0' and JOBS=1 choose others.
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin
export VENV JOBS
export HF_HUB_OFFLINE = 1

.PHONY: quickstart test check bench install-train install-dev

quickstart: install-train  ## fine-tune the bundled model on this machine
	$(BIN)/fastlora quickstart

test: install-dev  ## the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: install-dev  ## lint, types, every GPU kernel compiled ahead of time, its main loop no worse than before; the figures are those measured
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m bench.static --check && $(BIN)/python -m bench.readme --check
	PYTHON=$(BIN)/python .ci/aot 3.4.0 && PYTHON=$(BIN)/python .ci/aot 3.9.0

bench: install-dev  ## one linear on the CPU: time and memory, appended to bench/results
	$(BIN)/python -m bench.linear && $(BIN)/python -m bench.linear --memory

install-train install-dev: install-%:
	@.ci/venv $*
