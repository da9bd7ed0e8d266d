# Every target makes the environment it needs in .venv. PYTHON picks the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Where pip finds PyTorch's CPU build, if its index is not the default one: make test TORCH="--index-url ..."
TORCH ?=
# A converted model directory for make demo, instead of the small model.
MODEL ?=
WORKERS ?= 2

.PHONY: demo test test-slow lint docs dist clean

demo: $(VENV)/installed
	$(BIN)/faithdiff restore --input examples --output restored --overwrite --compare --references examples/originals \
		$(if $(MODEL),--model "$(MODEL)" --captions examples/captions --scale 4)

# Without restarts, a worker that dies ends the run with the name of its test; with them, the run may never end.
test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not slow"

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m slow --timeout 0

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(WORKERS) faithdiff_jax

# The site, in build/docs/index.html: every page with code cells is run, and a warning is an error.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -E -j 2 -b html docs build/docs

# What a release uploads, in dist/: the source and the wheel, checked, and the wheel tried in an environment of its own.
dist: $(VENV)/installed-dist
	rm -rf dist build/lib build/wheel
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install -q dist/*.whl
	cd build && wheel/bin/faithdiff restore --input ../examples/camera.png --output wheel/restored --steps 1

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml setup.py
	$(BIN)/python -m pip install -q -e .
	touch $@

# PyTorch goes first: pip then keeps the build that is there instead of fetching another with CUDA.
$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml setup.py
	$(BIN)/python -m pip install -q $(TORCH) torch==2.13.0
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $(VENV)/installed $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install -q -e ".[docs]"
	touch $@

$(VENV)/installed-dist: $(VENV)/bin/python pyproject.toml setup.py
	$(BIN)/python -m pip install -q build twine
	touch $@

clean:
	rm -rf $(VENV) restored build dist *.egg-info
