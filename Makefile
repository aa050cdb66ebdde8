# The targets a newcomer needs: `make demo` and `make test`. `make help` lists all.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo verify gallery experiments-small docs bench bench-gpu test test-all lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install the package with its pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

DEMO := runs/demo

demo: $(STAMP) ## train a toy and a digits flow in about three minutes, and print where the pictures are
	$(BIN)/fmlightning fit --config configs/toy/moons.yaml --run_dir $(DEMO)/moons --rerun
	$(BIN)/fmlightning sample $(DEMO)/moons --n 2000 --out $(DEMO)/moons/generated
	$(BIN)/fmlightning fit --config configs/images/digits.yaml --run_dir $(DEMO)/digits --rerun
	$(BIN)/fmlightning sample $(DEMO)/digits --n 100 --out $(DEMO)/digits/generated
	@for name in moons digits; do \
	  $(BIN)/fmlightning show $(DEMO)/$$name; echo; \
	  $(BIN)/fmlightning report $(DEMO)/$$name --expected experiments/demo_$$name/expected.json; echo; \
	done

verify: $(STAMP) ## hold the mathematics against closed-form oracles and print the table
	$(BIN)/fmlightning verify

gallery: $(STAMP) ## draw the pictures of the theory in experiments/seed_gallery
	$(BIN)/python experiments/seed_gallery/gallery.py

experiments-small: $(STAMP) ## run the small experiments (an hour on 2 cores), check them, and write their tables
	$(BIN)/python experiments/small.py

docs: $(STAMP) ## write the documentation as HTML into site/
	$(BIN)/python docs/build.py

BENCH   := benchmarks/.venv
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

bench: $(BENCH)/.installed ## measure against the peers on the CPU (20 minutes) and write the README's table
	$(BENCH)/bin/python benchmarks/run.py
	$(BENCH)/bin/python benchmarks/readme.py

bench-gpu: $(STAMP) ## measure the CIFAR-10 U-Net on a GPU
	$(BIN)/python benchmarks/gpu.py

# the peers stand on top of .venv: its torch is theirs, and nothing of it changes
$(BENCH)/.installed: benchmarks/requirements.txt $(STAMP)
	test -x $(BENCH)/bin/python || $(BIN)/python -m venv --without-pip $(BENCH)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(BENCH)/bin/python $(PURELIB))/below.pth"
	$(BIN)/python -m pip --python $(BENCH)/bin/python install --quiet --no-deps --requirement $<
	touch $@

lint: $(STAMP) ## ruff, the format check, who may import whom, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## lint and the tests that take minutes
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: lint ## every test, the long ones too
	$(BIN)/pytest -n 2 --dist worksteal

lock: $(STAMP) ## write constraints.txt from what is installed
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' > constraints.txt

clean: ## remove .venv and the caches; runs stay
	rm -rf $(VENV) $(BENCH) site .pytest_cache .mypy_cache .ruff_cache
