# make demo   a virtual environment, the package, and the demonstration on real images
# make test   the same set-up with the tools of development, and the whole suite
# make lint   style and types

TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= stratagem-demo

BIN := $(VENV)/bin
# Succeeds where a torch that is new enough is already installed; then it is left as it is.
HAS_TORCH := -c "from importlib.metadata import version as v; assert tuple(map(int, v('torch').split('.')[:2])) >= (2, 11)"

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/stratagem demo --out $(OUT)

# One thread for each of the processes: threads that wait for each other by spinning would share cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.torch:
	@if $(PYTHON) $(HAS_TORCH) 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi
	@$(BIN)/python $(HAS_TORCH) 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(OUT)
