# Two commands for a machine with Python >= 3.11, make and git: `make serve` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint ci/constraints.txt

.PHONY: serve test interpret compiled lint types laws bench clean

# Serve a model (MODEL=..., empty = the bundled demo) on what this machine has; ARGS=... adds flags.
serve: $(VENV)/.ready-serve
	$(BIN)/sixfold serve $(MODEL) $(ARGS)

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest $(ARGS)

# Triton's interpreter is a mode of a whole process: these tests have one of their own.
interpret: $(VENV)/.ready-dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpret $(ARGS)

# Every Triton kernel compiled for GPUs that are not here, against the recorded needs of each.
compiled: $(VENV)/.ready-dev
	$(BIN)/python -m pytest tests/compile
	$(BIN)/python ci/compile_table.py --check $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/python ci/check_types.py

laws: $(VENV)/.ready-dev
	$(BIN)/lint-imports
	$(BIN)/python ci/count_predicates.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sixfold needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# ci/install.py looks at the hardware and installs the extra (and the torch build) that fits it.
$(VENV)/.ready-serve: $(VENV)/bin/python pyproject.toml ci/constraints.txt ci/install.py
	$(BIN)/python ci/install.py demo
	@touch $@

$(VENV)/.ready-test: $(VENV)/bin/python pyproject.toml ci/constraints.txt ci/install.py
	$(BIN)/python ci/install.py demo test
	@touch $@

$(VENV)/.ready-dev: $(VENV)/bin/python pyproject.toml ci/constraints.txt ci/install.py
	$(BIN)/python ci/install.py demo test dev
	@touch $@ $(VENV)/.ready-test $(VENV)/.ready-serve

clean:
	rm -rf $(VENV) build dist *.egg-info
