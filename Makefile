# Every target sets up what it needs, the virtual environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CODE := src tests benchmarks scripts examples
STAMP := $(VENV)/.installed
# Test files are dealt to so many processes, which take about 2 GiB each.
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test check format lint types imports clean

demo: $(STAMP)  ## Compare centralized, federated and decentralized DPO on the built-in town.
	$(BIN)/prefmesh compare examples/town.yaml --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP)  ## The tests: unit, property, equivalence, doctests.
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

check: lint types imports test  ## The whole gate, as CI runs it.

lint: $(STAMP)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

types: $(STAMP)
	$(BIN)/pyright

imports: $(STAMP)  ## Who may import whom (pyproject.toml, [tool.importlinter]).
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# torch first and pinned: a range would let pip choose the build with CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
