# The two that matter:  make demo   and   make test.  Both make .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OTHER_DUCKDB := .duckdb-1.5
STAMP := $(VENV)/.installed

.PHONY: demo test test-quick test-duckdb-1.5 lint docs-check docs bench-tiny clean

demo: $(STAMP)
	$(BIN)/semid demo --output demo.duckdb

# lint, the whole suite with DuckDB 2, the whole suite with DuckDB 1.5, and the generated pages
test: lint docs-check test-quick test-duckdb-1.5

test-quick: $(STAMP)
	$(BIN)/python -c "import duckdb; print('with DuckDB', duckdb.__version__)"
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-duckdb-1.5: $(STAMP) $(OTHER_DUCKDB)/.installed
	PYTHONPATH=$(OTHER_DUCKDB) $(BIN)/python -c "import duckdb; print('with DuckDB', duckdb.__version__)"
	PYTHONPATH=$(OTHER_DUCKDB) $(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-check: $(STAMP)
	$(BIN)/python docs/generate.py --check

docs: $(STAMP)
	$(BIN)/python docs/generate.py

bench-tiny: $(STAMP)
	$(BIN)/python -m benchmarks.main_job --tiny --rounds 1

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(OTHER_DUCKDB)/.installed: constraints.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OTHER_DUCKDB) 'duckdb==1.5.6'
	touch $@

clean:
	rm -rf $(VENV) $(OTHER_DUCKDB) demo.duckdb demo.duckdb.wal
