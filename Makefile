# Every target sets up all it needs on a fresh machine: python3 (3.11 or newer) with venv, and pip's package index.
# On Linux the default torch wheel brings CUDA along; to save the gigabytes, point pip at PyTorch's CPU index first
# (PIP_EXTRA_INDEX_URL or your pip.conf). Nothing here needs a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2

.PHONY: quickstart test test-thorough docs bench format clean

quickstart: $(VENV)/.installed
	$(BIN)/ubsmoe compare runs/quickstart.toml --variants runs/quickstart_variants.toml --seeds 1 --jobs $(JOBS) --out out/quickstart

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS)

test-thorough: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(JOBS) -m ""

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs site

bench: $(VENV)/.installed-dev
	set -e; for script in bench/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist site docs/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps say that an install has ended; they age when the requirements change.
$(VENV)/.installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)
