# make install | demo | test | soak | lint: each makes .venv from constraints.txt first, and reuses it afterwards.
# Needs Python 3.11 or newer with its headers, make and g++ (DeepSpeed compiles two kernels at first use).

PYTHON ?= python3.11
VENV := $(CURDIR)/.venv
INSTALLED := $(VENV)/installed

export PATH := $(VENV)/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(VENV)/torch_extensions
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test soak lint

install: $(INSTALLED)

demo: $(INSTALLED)
	python tools/demo.py

test: $(INSTALLED)
	python -m pytest -m "not soak" --numprocesses 2 --dist loadfile

soak: $(INSTALLED)
	python -m pytest -m soak -s

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy shards pipeline recipes tools

$(INSTALLED): setup.cfg pyproject.toml constraints.txt shards/crop_decode.c
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
