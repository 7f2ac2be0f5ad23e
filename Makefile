# make demo    compress a real model and print what it cost (downloads 93 MB once)
# make test    run the tests
# make zero    install DeepSpeed and run the tests that need it
# make check   ruff and pyright
# make venv    only install; the others do it themselves
# make clean   remove .venv and caches

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL = $(BIN)/python -m pip install -q --no-compile -c constraints.txt
PYTEST_ARGS ?= -q -n auto --maxprocesses 4 --dist worksteal
# Tests that run whole models. Shapes are checked at every call in all others, which takes a third of their time.
WHOLE := $(addprefix tests/,cli contract core errors export integration recipes run scripts test_readme.py)
UNCHECKED := -o addopts="--strict-markers --strict-config --import-mode=importlib"

export TOKENIZERS_PARALLELISM := false
# Bytecode is kept, whatever the shell says: tests start many processes, and each would compile Transformers again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test zero check venv clean

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

# One thread a process: tiny models gain nothing from more, and processes that compete for cores lose a factor of ten.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) $(addprefix --ignore=,$(WHOLE))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) $(UNCHECKED) $(WHOLE)

# Its operators are for accelerators, and are left out.
zero: $(STAMP)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(INSTALL) --no-build-isolation deepspeed
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/distillation/test_zero.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

venv: $(STAMP)

# torch comes first and alone: its build decides whether the rest is a CPU or an accelerator installation, and it brings
# the setuptools that then builds hf_slim itself, so that nothing unpinned is fetched. Bytecode is left to first use: most
# of it never is.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "hf_slim needs Python 3.10 or newer, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0 setuptools
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hf_slim tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
