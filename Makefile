# Two commands for a newcomer: `make demo` and `make test`. Both make their own .venv first.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs/demo
# LOCK=requirements.lock installs the versions that CI tests, by their hashes, in place of the newest.
LOCK ?=
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: demo demo-paper test coverage docs campaign lint types lock audit clean

# Four parents that know different things, each with its own list of labels, become one network of all of them.
# Small parents, trained briefly: patches of 8 x 8 pixels, of which each has 2 x 2 of a scan.
# The fusion saw no shifted scans, and a short finetuning on such would first cost it what it has.
SHORT := --trainer.max_epochs 10 --model.args.patch_size 8
demo: .venv/runtime
	@echo "== four parents: each learns two or three of the ten digits"
	$(BIN)/python train.py $(SHORT) --seed 1 --data.classes "[0,1,2]" --output $(RUNS)/zero-to-two --overwrite
	$(BIN)/python train.py $(SHORT) --seed 2 --data.classes "[3,4]" --output $(RUNS)/three-and-four --overwrite
	$(BIN)/python train.py $(SHORT) --seed 3 --data.classes "[5,6,7]" --output $(RUNS)/five-to-seven --overwrite
	$(BIN)/python train.py $(SHORT) --seed 4 --data.classes "[8,9]" --output $(RUNS)/eight-and-nine --overwrite
	@echo "== one network of them: no training, no labels"
	$(BIN)/python fuse.py --overwrite --output $(RUNS)/fused --compare wide --parents \
		$(RUNS)/zero-to-two $(RUNS)/three-and-four $(RUNS)/five-to-seven $(RUNS)/eight-and-nine
	@echo "== a short finetuning of it on all ten digits"
	$(BIN)/python finetune.py --model $(RUNS)/fused --output $(RUNS)/finetuned --overwrite --optim.lr 3e-5 \
		--trainer.max_epochs 4 --data.shift 0

# The paper's setting: parents of the same data and other seeds, aligned by optimal transport, averaged, finetuned.
demo-paper: .venv/runtime
	$(BIN)/python train.py --seed 1 --output $(RUNS)-paper/seed-1 --overwrite
	$(BIN)/python train.py --seed 2 --output $(RUNS)-paper/seed-2 --overwrite
	$(BIN)/python fuse.py --parents $(RUNS)-paper/seed-1 $(RUNS)-paper/seed-2 --output $(RUNS)-paper/fused --overwrite \
		--compare paper transport
	$(BIN)/python finetune.py --model $(RUNS)-paper/fused --output $(RUNS)-paper/finetuned --overwrite

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

# Which lines of fusionpl/ the suite runs.
coverage: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term $(PYTEST)

# The site, with the notebook run: build/site/index.html.
docs: .venv/docs
	EXECUTE_NOTEBOOKS=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

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
	$(if $(LOCK),$(INSTALL) --require-hashes -r $(LOCK),$(INSTALL) -r requirements.txt)
	$(INSTALL) $(if $(LOCK),--no-deps) -e .
	touch $@

.venv/dev: .venv/runtime
	$(if $(LOCK),,$(INSTALL) -e '.[dev]')
	touch $@

.venv/docs: .venv/runtime
	$(INSTALL) -e '.[docs]'
	touch $@

# The newest versions that resolve, with their hashes.
lock: .venv/runtime
	$(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-annotate --no-header --python $(BIN)/python \
		--extra dev pyproject.toml -o requirements.lock

# Known holes in the locked versions; asks the network.
audit: .venv/runtime
	$(BIN)/uv tool run pip-audit --disable-pip --require-hashes -r requirements.lock

clean:
	rm -rf build runs .venv .mypy_cache .pytest_cache .ruff_cache .coverage
