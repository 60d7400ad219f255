# Each target works alone on a fresh clone: it makes .venv and installs what constraints.txt pins, unless that is done.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP = $(VENV)/.installed

.PHONY: install test demo lint benchmark

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@echo 'installing into $(VENV); this takes about a minute'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[mm,demo,dev]'
	touch $@
	@echo 'installed in $(VENV)'

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

demo: install
	$(BIN)/python demo/run.py

lint: install
	$(BIN)/ruff check .

benchmark: install
	$(BIN)/python tools/benchmark.py
