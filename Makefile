# The two that matter:  make demo   and   make test.  Both make .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OTHER_DUCKDB := .duckdb-1.5
STAMP := $(VENV)/.installed
# what these test has nothing to do with DuckDB, or is on top of what others test with both, so that they run once
WITHOUT_DUCKDB := alignment balanced_rq baselines beam bench benchmarks codes demo devices gpu layers lookup metrics \
	native plugins quantizers report report_cli report_page rq tiers vectors whole_files
# so have these: pages of docs/ that show what the others show, too, arrays that never get as far as DuckDB, and defects
PARTS_WITHOUT_DUCKDB := $(patsubst %,test_docs.py::test_page[%.md],collisions gpu plugins quantizers report retrain search) \
	test_bad_input.py::test_every_kind_of_array_gives_the_same_hits \
	reliability/test_state_machine.py::test_a_defect_is_noticed
PEERS := $(VENV)/.peers

.PHONY: demo test test-quick test-duckdb-1.5 test-long lint docs-check docs bench-tiny bench clean

demo: $(STAMP)
	$(BIN)/semid demo --output demo.duckdb

# lint, the whole suite with DuckDB 2, what depends on it with DuckDB 1.5, the generated pages, and the benchmark on 2,000 rows
test: lint docs-check test-quick test-duckdb-1.5 bench-tiny

test-quick: $(STAMP)
	$(BIN)/python -c "import duckdb; print('with DuckDB', duckdb.__version__)"
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-duckdb-1.5: $(STAMP) $(OTHER_DUCKDB)/.installed
	PYTHONPATH=$(OTHER_DUCKDB) $(BIN)/python -c "import duckdb; print('with DuckDB', duckdb.__version__)"
	PYTHONPATH=$(OTHER_DUCKDB) $(BIN)/python -m pytest -q -n auto --dist worksteal $(WITHOUT_DUCKDB:%=--ignore tests/test_%.py) \
		$(PARTS_WITHOUT_DUCKDB:%=--deselect 'tests/%')

# hours: the long forms of tests/reliability; the figures that they print are those of docs/reliability.md
test-long: $(STAMP)
	SEMID_LONG=1 $(BIN)/python -m pytest -q -s tests/reliability

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-check: $(STAMP)
	$(BIN)/python docs/generate.py --check

docs: $(STAMP)
	$(BIN)/python docs/generate.py

# every benchmark subject that can be installed here, on 2,000 rows of the bundled sample; fails if one fails
bench-tiny: $(PEERS)
	$(BIN)/semid bench sample --effort tiny --rows 2000 --queries 100 --strict --fresh --output $(VENV)/bench-tiny

# the figures of docs/benchmarks.md: make bench DATA=folder; hours. QUICK="--hour --minutes 55" takes an hour
bench: $(PEERS)
	$(BIN)/python -m benchmarks.published $(if $(DATA),--data $(DATA)) $(QUICK)
	$(BIN)/python docs/generate.py

# scann has wheels for some systems only, and hnswlib for none: it wants a C++ compiler
$(PEERS): $(STAMP)
	for peer in usearch scann hnswlib; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$peer \
		|| echo "$$peer cannot be installed here: the benchmark leaves it out"; \
	done
	touch $@

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard semid_index/native/*.cpp semid_index/native/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(OTHER_DUCKDB)/.installed: constraints.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OTHER_DUCKDB) 'duckdb==1.5.6'
	touch $@

clean:
	rm -rf $(VENV) $(OTHER_DUCKDB) demo.duckdb demo.duckdb.wal
