# `make demo` and `make test` are all the set-up there is: each makes .venv and installs what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6
TESTS ?= tests
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-journeys test-slow test-gpu lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --durations 15 $(TESTS)

test-journeys: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "journey and not slow" --durations 15 $(TESTS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow --durations 0 $(TESTS)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu $(TESTS)

lint: $(VENV)/.test dparallel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The packages under their import names, for the type checker, which does not know pyproject.toml's mapping.
dparallel:
	mkdir dparallel
	ln -s ../modeling ../trainer ../hub_cards ../examples/evaluation dparallel

# torch first and by itself: which build it is (CPU, CUDA) is decided by this line and not by what others ask for.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

# Without PYTHONWARNINGS, setuptools warns of an editable installation in a box of asterisks.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet "$(TRANSFORMERS)" -e .
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet "$(TRANSFORMERS)" -e ".[test]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV)
