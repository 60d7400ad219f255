# Each target works alone on a fresh clone: it makes .venv and installs what constraints.txt pins, unless that is done.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP = $(VENV)/.installed
DOCS_STAMP = $(VENV)/.installed-docs
QUANTIZATION = $(VENV)/quantization
RAY = $(VENV)/ray
SPHINX = $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --jobs auto

.PHONY: install test test-slow test-quantization test-ray demo explore lint benchmark docs linkcheck notebooks

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@echo 'installing into $(VENV); this takes about a minute'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[mm,demo,dev,web]'
	touch $@
	@echo 'installed in $(VENV)'

$(DOCS_STAMP): $(STAMP)
	$(PIP) --no-build-isolation --editable '.[docs]'
	touch $@

# What needs a browser or the kernel of a notebook, and takes its time, is apart.
SLOW = tests/web/test_browser.py tests/tools/analysis/test_benchmark_explorer.py tests/test_notebooks.py

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(addprefix --ignore ,$(SLOW))

test-slow: install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(SLOW)

# torchao is apart from the environment: diffusers imports it at every start, which takes a second and prints lines.
test-quantization: $(QUANTIZATION)
	PYTHONPATH=$(QUANTIZATION) $(BIN)/python -m pytest --quiet tests/diffusion/test_quantization.py

$(QUANTIZATION): $(STAMP)
	$(PIP) --no-deps --target $@ torchao

# Ray is apart as well: half a gigabyte with what Ray Data needs and the environment lacks.
test-ray: $(RAY)
	PYTHONPATH=$(RAY) $(BIN)/python -m pytest --quiet tests/tools/test_extract_features_on_ray.py

$(RAY): $(STAMP)
	$(PIP) --no-deps --target $@ ray pandas pyarrow msgpack

demo: install
	$(BIN)/python demo/run.py

explore: install
	$(BIN)/python tools/toy/make_data.py demo/output/explore --train 24 --test 0 --size 256
	$(BIN)/python tools/explore.py demo/output/explore/toy/real/train --model demo/tiny-sd

lint: install
	$(BIN)/ruff check .

docs: $(DOCS_STAMP)
	rm -rf docs/api  # pages of modules that are gone
	$(SPHINX) --builder html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

notebooks: $(DOCS_STAMP)
	$(BIN)/python docs/execute_notebooks.py

linkcheck: $(DOCS_STAMP)
	$(SPHINX) --builder linkcheck docs docs/_build/linkcheck

benchmark: install
	$(BIN)/python tools/benchmark.py
