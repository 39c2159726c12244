# Two commands for a newcomer: `make demo` and `make test`. Both make their own .venv first.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs/demo

.PHONY: demo test campaign lint types clean

demo: .venv/runtime
	@echo "== two parents, a few minutes each"
	$(BIN)/python train.py --seed 1 --output $(RUNS)/seed-1 --overwrite
	$(BIN)/python train.py --seed 2 --output $(RUNS)/seed-2 --overwrite
	@echo "== align and average them: no training, no labels"
	$(BIN)/python fuse.py --parents $(RUNS)/seed-1 $(RUNS)/seed-2 --output $(RUNS)/fused --overwrite \
		--compare conf/fuse/paper.yaml
	@echo "== a short finetuning of the fused model, the best parent and the plain average"
	$(BIN)/python finetune.py --model $(RUNS)/fused --output $(RUNS)/finetuned --overwrite

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term $(PYTEST)

# Damaged files of each kind, and commands that are killed: MUTATIONS and KILLS say how many of each.
campaign: .venv/dev
	$(BIN)/python -m pytest tests/campaign -m campaign -s

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/dev
	$(BIN)/mypy

.venv/runtime: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("fusionpl needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt -e .
	touch $@

.venv/dev: .venv/runtime
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]'
	touch $@

clean:
	rm -rf runs .venv .mypy_cache .pytest_cache .ruff_cache .coverage
