# make demo   sets up .venv and exports the built-in small Gemma 4 to demo-output/model.pte (no GPU needed)
# make test   sets up .venv and runs the tests that need no GPU
# make test-fast  runs the tests that take a second or less: no lowering, no interpreted kernels
# make test-sweep runs the cases of wide grids that make test leaves out (tests/support/grids.py)
# make test-gpu   runs the tests that need a GPU
# make test-real  downloads real models into REAL_MODELS (350 MB, once) and runs the tests with their weights
# make lint   checks formatting, lint and types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= demo-output
WORKERS ?= 2
REAL_MODELS ?= .cache/real-models

PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS)

.PHONY: demo test test-fast test-sweep test-gpu test-real lint check-tools clean

demo: $(VENV)/.installed
	$(BIN)/export-model --target gemma4-31b --small --random-weights --verify-window 4 --output-dir $(DEMO_OUTPUT)

# Triton chooses between compiling and interpreting when a kernel is decorated, so each mode needs its own process.
test: $(VENV)/.installed
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not sweep" tests/kernels
	$(PYTEST) --dist loadgroup -m "not interpreter and not gpu and not sweep and not real"

test-fast: $(VENV)/.installed
	$(PYTEST) --dist loadgroup -m "not interpreter and not gpu and not sweep and not real and not lowering and not slow"

test-sweep: $(VENV)/.installed
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and sweep" tests/kernels
	$(PYTEST) --dist loadgroup -m "sweep and not interpreter and not gpu"

test-gpu: $(VENV)/.installed
	$(PYTEST) -m "gpu and not real"

# One worker: each model takes gigabytes. Tests that need a GPU are skipped without one.
test-real: $(VENV)/.installed
	$(BIN)/python tests/support/real_models.py "$(REAL_MODELS)"
	FLASHPTE_REAL_MODELS="$(abspath $(REAL_MODELS))" $(BIN)/python -m pytest -q -m real tests/real

lint: $(VENV)/.linters
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .typing/flashpte
	for part in passes kernels export package/__init__.py package/py.typed; do \
	  ln -sfn "$(CURDIR)/$$part" ".typing/flashpte/$$(basename $$part)"; done
	MYPYPATH=.typing $(BIN)/mypy -p flashpte

check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old ($$($(PYTHON) --version)): set PYTHON= to Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "the venv module of $(PYTHON) is missing: install it (Debian: apt install python3-venv)"; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is missing: install it (Debian: apt install g++)"; exit 1; }

# --no-compile: 20,000 modules are installed; Python compiles the few that are used at their first import.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt | check-tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .typing $(DEMO_OUTPUT)
